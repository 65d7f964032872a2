"""Going on with a run: which images are finished, of which input, and made with what."""

import math
from collections.abc import Sequence
from typing import Any

from evaluation.comparison import TOLERANCE
from runs.checks import SettingsError
from runs.environment import differences
from runs.metrics_file import Record
from runs.problems import SumsOf
from runs.record import RunFolder
from runs.result import Problem


def is_finished(record: Record | None, problem: Problem) -> bool:
    """Was this very input reconstructed (a failed image is tried again)?"""
    return record is not None and record["state"] != "failed" and has_same_input(record, problem)


def has_same_input(record: Record, problem: Problem) -> bool:
    """Is a record one of this problem's input: by its checksum, or by name and measurement where it has none?"""
    if record.get("input") is not None:
        return record["input"]["sha256"] == problem.source.sha256
    if record.get("name") != problem.name:
        return False
    stored = (record.get("measurement") or {}).get("fingerprint")
    now = (problem.y.double().mean().item(), problem.y.double().square().mean().sqrt().item())
    return stored is None or all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in zip(stored, now, strict=True))


def set_replaced_aside(folder: RunFolder, problems: Sequence[Problem], sums_now: SumsOf) -> list[str]:
    """Records of inputs that were replaced since count no more; returns a sentence for each.

    Args:
        folder: of the run.
        problems: what this start is asked for.
        sums_now: checksums of other inputs by their ids.
    """
    asked, said = {p.image_id: p for p in problems}, []
    others = [i for r in folder.records() if (i := r["image_id"]) not in asked and r.get("input") is not None]
    sums = sums_now(others) if others else {}

    def is_stale(record: Record | None) -> bool:
        if record is None:
            return False
        if (problem := asked.get(record["image_id"])) is not None:
            return not has_same_input(record, problem)
        return sums.get(record["image_id"], record["input"]["sha256"]) != record["input"]["sha256"]

    for image_id in (*asked, *others):
        if is_stale(folder.record(image_id)):
            with folder.claim(image_id) as mine:  # or another process has just done it again
                record = folder.record(image_id)
                if mine is True and is_stale(record):
                    folder.set_aside(image_id)
                    then = "done again" if image_id in asked else f"its numbers count no more (image {image_id})"
                    said.append(f"{record['name']}: its input was replaced since it was reconstructed; {then}")
    return said


def check_weights(folder: RunFolder, prior_sha256: str, path: str | None) -> None:
    """The prior of a run that goes on is the one that it began with.

    Raises:
        SettingsError: it has other weights.
    """
    others = [r["image_id"] for r in folder.records() if r.get("prior_sha256", prior_sha256) != prior_sha256]
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
