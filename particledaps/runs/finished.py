"""Is everything that is asked for finished? Told without torch, so that it takes a second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from particledaps.checks import DataError, SettingsError
from particledaps.data.image_sets import demo_source, folder_images
from particledaps.data.npz_images import npz_rows
from particledaps.reports.run_table import results_table
from particledaps.runs.folder import RunFolder
from particledaps.runs.pending import Pending
from particledaps.runs.resume import folder_ids, is_finished

if TYPE_CHECKING:
    from particledaps.data.sources import Source
    from particledaps.settings.schema import DataSettings

Missing = dict[int, tuple[str, str]]


def finished_before(data: DataSettings, save_dir: str, name: str, config: dict[str, Any]) -> Missing | None:
    """Print the table of a run that is finished; None where anything is left to do, to look at or to say.

    Args:
        data: images of a folder or an archive, or the demo's; checked.
        save_dir: folder of all results.
        name: of the run.
        config: its merged configuration, without nulls that follow from the prior's family.

    Returns:
        State and error of each image of this run without an answer.
    """
    try:
        folder = RunFolder(save_dir, name, config)
        if not (folder.path / "metrics.json").is_file() or folder.damaged():
            return None
        asked = _asked(data, folder)
        others = {r["image_id"] for r in folder.summaries()} - {p.image_id for p in asked}
        if not asked or others or not all(_is_done(folder, pending) for pending in asked):
            return None
    except (SettingsError, DataError, OSError, KeyError):  # told where the run itself meets it
        return None
    return report(folder, asked, finished=True)


def _asked(data: DataSettings, folder: RunFolder) -> list[Pending]:
    """The images of this start, with their sources only."""
    if data.kind == "demo":
        records = [r for r in folder.summaries() if r.get("input")]
        end = len(records) if data.end_id is None else data.end_id
        names = {r["image_id"]: r["input"]["name"] for r in records}
        if data.end_id is None and len(records) < 3:  # the demo has three images
            return []
        return [_pending(i, names[i], demo_source(names[i])) for i in range(data.start_id, end)]
    if data.kind == "npz":
        images = npz_rows(data)
    else:
        images = folder_images(data, (3, 1, 1), folder_ids(data, folder, quiet=True))
    return [_pending(i, images.names[k], images.source(k)) for k, i in enumerate(images.ids)]


def _pending(image_id: int, name: str, source: Source) -> Pending:
    def load() -> None:
        raise DataError(f"{name} is not read here")

    return Pending(image_id, name, lambda: source, load)


def _is_done(folder: RunFolder, pending: Pending) -> bool:
    record = folder.summary(pending.image_id)
    return record is not None and not folder.damaged_files(record) and is_finished(record, pending)


def report(folder: RunFolder, asked: Sequence[Pending], finished: bool = False) -> Missing:
    """Bring ``metrics.json`` up to date and print the table; state and error of each image without an answer."""
    for pending in asked if finished else ():
        print(f"{pending.title}: finished before, skipped")
    metrics = folder.save_metrics()
    print("\n" + results_table(metrics, {p.image_id: p.title for p in asked}))
    print(f"\nresults in {folder.path}: metrics.json, sheets/, trajectory/, samples/, floats/")
    own = {p.image_id for p in asked}
    rows = [r for r in metrics["status"]["per_image"] if r["image_id"] in own and r["state"] != "ok"]
    return {r["image_id"]: (r["state"], r["error"] or r["state"]) for r in rows}
