"""Going on with a run: which images are finished, of which input, and made with what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from particledaps.checks import SettingsError
from particledaps.data.image_folder import assign_ids, image_files, other_files
from particledaps.names import shown
from particledaps.reports.comparison import TOLERANCE
from particledaps.reports.write_metrics import HAS_RESULT, Record
from particledaps.runs.folder import RunFolder
from particledaps.runs.pending import Pending
from particledaps.settings.environment import differences
from particledaps.settings.schema import DataSettings

SumsOf = Callable[[Sequence[int]], dict[int, str]]
"""Image ids -> checksums of their inputs as they are now, for those that there are."""
REPLACED = "its input was replaced since it was reconstructed"


def is_finished(record: Record | None, pending: Pending) -> bool:
    """Was this very input reconstructed, and drawn (a failed or skipped image is tried again)?"""
    if record is None or record["state"] not in HAS_RESULT or ("files" in record and record["files"] is None):
        return False
    return has_same_input(record, pending)


def has_same_input(record: Record, pending: Pending) -> bool:
    """Is a record one of this input: by its checksum, or by name and measurement where it has none?"""
    if record.get("input") is not None:
        return record["input"]["sha256"] == pending.source().sha256
    if record.get("name") != pending.name:
        return False
    stored, y = record["measurement"]["fingerprint"], pending.load().y.double()
    now = (y.mean().item(), y.square().mean().sqrt().item())
    return stored is None or all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(stored, now, strict=True))


def set_stale_aside(folder: RunFolder, asked: Sequence[Pending], sums_now: SumsOf) -> list[str]:
    """Records count no more whose inputs were replaced since, or whose files are damaged; a sentence for each.

    Args:
        folder: of the run.
        asked: what this start is asked for.
        sums_now: checksums of other inputs by their ids.
    """
    pending, said = {p.image_id: p for p in asked}, []
    others = [i for r in folder.summaries() if (i := r["image_id"]) not in pending and r.get("input") is not None]
    sums = sums_now(others) if others else {}

    def fault(record: Record | None) -> str | None:
        if record is None or record["state"] not in HAS_RESULT:
            return None
        if damaged := folder.damaged_files(record):
            return f"{damaged[0]} is damaged (another size than when it was written)"
        own = pending.get(record["image_id"])
        if own is not None:
            return None if has_same_input(record, own) else REPLACED
        known = record["input"]["sha256"]
        return None if sums.get(record["image_id"], known) == known else REPLACED

    for image_id in (*pending, *others):
        if fault(folder.summary(image_id)) is None:
            continue
        with folder.claim(image_id) as mine:  # or another process has just done it again
            record = folder.summary(image_id)
            if mine is True and (why := fault(record)) is not None:
                folder.set_aside(image_id)
                then = "done again" if image_id in pending else f"its numbers count no more (image {image_id})"
                said.append(f"{shown(record.get('name') or str(image_id))}: {why}; {then}")
    return said


def folder_ids(data: DataSettings, folder: RunFolder, quiet: bool = False) -> dict[str, int] | None:
    """Ids of the images of ``data.dir`` by their paths below it, as this run knows them; None for other data.

    Raises:
        DataError: there is no image.
    """
    if data.measurement is not None or data.kind != "folder":
        return None
    root = Path(data.dir)
    files = image_files(root, [folder.path])
    if not quiet and (others := other_files(root, [folder.path])):
        print(others)
    names = [path.relative_to(root).as_posix() for path in files]
    return assign_ids(root, files, folder.known_files(names))


def check_weights(folder: RunFolder, prior_sha256: str, path: str | None) -> None:
    """The prior of a run that goes on is the one that it began with.

    Raises:
        SettingsError: it has other weights.
    """
    others = [r["image_id"] for r in folder.summaries() if r.get("prior_sha256", prior_sha256) != prior_sha256]
    if others:
        raise SettingsError(
            f"model.path={path}: the prior has other weights than when {folder.path} was begun (image {others[0]}); "
            "choose another name= or save_dir=, or remove that folder"
        )


def other_environment(records: Sequence[Record], now: dict[str, Any]) -> list[str]:
    """In what the finished images were made differently; empty where nothing is known to differ."""
    found: dict[str, None] = {}
    for record in records:
        found |= dict.fromkeys(differences(record.get("environment") or {}, now))
    return list(found)
