"""Paired differences of runs against the first one, as a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import NamedTuple

from particledaps.reports.comparison import (
    Estimate,
    common_images,
    paired_difference,
    paired_ratio,
    pairs,
    partners,
    without_fingerprint,
)
from particledaps.reports.finished_runs import METRICS, ImageResult, Run
from particledaps.reports.summary import label_runs, metric_title
from particledaps.reports.tables import Cell, Column, Table

COMPARED = [("psnr_aligned", "best"), ("psnr_aligned", "mean"), ("psnr", "best"), ("psnr", "mean")]
COMPARED += [("psnr", "selected"), ("psnr_aligned", "selected"), ("ssim_aligned", "best"), ("ssim_aligned", "mean")]


class Quantity(NamedTuple):
    """What is compared: a name with its unit, and its value of one image."""

    name: str
    of: Callable[[ImageResult], float | None]


RATIOS = (
    Quantity("seconds an image, ratio", lambda i: i.seconds),
    Quantity("CPU seconds an image, ratio", lambda i: i.cpu_seconds),
)


def _metric_quantity(metric: str, field: str) -> Quantity:
    title, _, unit, _ = metric_title(metric)
    return Quantity(f"{title} {field}{unit}", lambda i: i.value(metric, field))


def quantities(everything: bool = False) -> list[Quantity]:
    """What two runs are compared by, per image.

    Args:
        everything: best, mean and selected of every metric, not the compact set.
    """
    chosen = [(m, f) for m in METRICS for f in ("best", "mean", "selected")] if everything else COMPARED
    return [
        *(_metric_quantity(metric, field) for metric, field in chosen),
        Quantity("success rate", lambda i: None if i.success is None else float(i.success)),
        Quantity("particle success rate", lambda i: i.solved_fraction),
        Quantity("coverage", lambda i: i.coverage),
        Quantity("final loss, lowest", lambda i: min(i.loss, default=None)),
    ]


def comparison_table(runs: list[Run], everything: bool = False) -> tuple[Table, list[str]]:
    """Paired differences of every other run against the first, over the images of both.

    Returns:
        The table (differences are other - first, seconds are a ratio other / first), and one note for each thing
        that was left out.

    Raises:
        ComparisonError: two runs did not see the same measurements.
    """
    columns = [
        Column("run", "run"),
        Column("against", "against"),
        Column("quantity", "quantity"),
        Column("first_mean", "first run", ".4g"),
        Column("run_mean", "this run", ".4g"),
        Column("difference", "difference", ".4g", with_error=True),
        Column("images", "images", "d"),
    ]
    (first, *others), (label, *labels) = runs, label_runs(runs)
    rows, notes = [], []
    for run, name in zip(others, labels, strict=True):
        common_images(first.measurements, run.measurements)
        ids = partners(first.measurements, run.measurements)
        rows += [[name, label, *cells] for cells in _differences(first, run.with_ids(ids), quantities(everything))]
        notes += [f"{name} against {label}: {note}" for note in _left_out(first, run, ids)]
    return Table(columns, rows), notes


def _differences(first: Run, other: Run, compared: list[Quantity]) -> list[list[Cell]]:
    rows = []
    for quantity in compared:
        a, b = ({i: quantity.of(image) for i, image in run.images.items()} for run in (first, other))
        rows.append(_difference_row(quantity.name, a, b, paired_difference(a, b)))
    for quantity in RATIOS:
        a, b = ({i: quantity.of(image) for i, image in run.images.items()} for run in (first, other))
        if pairs(a, b) or quantity is not RATIOS[-1]:  # older records count no CPU seconds
            rows.append(_difference_row(quantity.name, a, b, paired_ratio(a, b)))
    return rows


def _difference_row(name: str, a: dict[int, float], b: dict[int, float], result: Estimate) -> list[Cell]:
    both = pairs(a, b)
    means = [statistics.fmean(side) for side in zip(*both, strict=True)] or [None, None]
    return [name, *means, result, result.count]


def _left_out(first: Run, other: Run, ids: dict[int, int]) -> list[str]:
    notes = []
    for run, common in ((first, sorted(ids.values())), (other, sorted(ids))):
        alone = [i for i in run.images if i not in common]
        diverged = [i for i in common if not run.images[i].loss]
        if alone:
            notes.append(f"left out {id_ranges(alone)}, only in {run.path}")
        if diverged:
            notes.append(f"{id_ranges(diverged)} diverged in {run.path}, counted in success rate and coverage only")
    unknown = without_fingerprint(first.measurements, other.measurements)
    if unknown:
        notes.append(f"{id_ranges(unknown)} matched by noise floor only, a file has no fingerprint of y")
    return notes


def id_ranges(ids: Iterable[int]) -> str:
    """``images 0-2, 5`` of 0, 1, 2, 5."""
    ordered, spans = sorted(ids), []
    for i in ordered:
        if spans and spans[-1][1] == i - 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    text = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"image{'s' if len(ordered) > 1 else ''} {text}"
