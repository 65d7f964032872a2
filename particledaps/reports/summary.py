"""What a table says of finished runs: one row a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from particledaps.reports.comparison import Estimate, estimate
from particledaps.reports.finished_runs import METRICS, Run
from particledaps.reports.tables import Cell, Column, Table

UNITS = {"psnr": ("PSNR", "_db", " [dB]", ".2f"), "ssim": ("SSIM", "", "", ".3f"), "lpips": ("LPIPS", "", "", ".3f")}
COMPACT = {
    "run",
    "images",
    "psnr_best_db",
    "psnr_aligned_best_db",
    "psnr_aligned_mean_db",
    "psnr_selected_db",
    "psnr_aligned_std_db",
    "ssim_aligned_best",
    "lpips_aligned_best",
    "success_rate",
    "particle_success_rate",
    "coverage",
    "seconds_per_image",
    "peak_vram_mb",
}


class ColumnOf(NamedTuple):
    """A column and how a run fills it."""

    column: Column
    of: Callable[[Run], Cell]


def label_runs(runs: list[Run]) -> list[str]:
    """Names of runs, each with its path where two share a name."""
    names = [run.name for run in runs]
    return [f"{r.name} ({r.path})" if names.count(r.name) > 1 else r.name for r in runs]


def run_table(runs: list[Run], everything: bool = False) -> Table:
    """One row a run.

    Args:
        runs: finished runs.
        everything: all columns, not the compact set.
    """
    labels = {id(run): label for run, label in zip(runs, label_runs(runs), strict=True)}
    entries = [
        ColumnOf(Column("run", "run"), lambda r: labels[id(r)]),
        *_count_entries(),
        *(entry for metric in METRICS for entry in _metric_entries(metric)),
        _misfit_entry(),
        *_success_entries(),
        *_cost_entries(),
        *(entry for phase in _phase_names(runs) for entry in _phase_entries(phase)),
    ]
    blind = any(not image.quality for run in runs for image in run.images.values())
    compact = COMPACT | {"misfit_best"} if blind else COMPACT  # without truth the misfit is all there is
    shown = [e for e in entries if everything or e.column.key in compact]
    return Table([e.column for e in shown], [[e.of(run) for e in shown] for run in runs])


def _count_entries() -> list[ColumnOf]:
    return [
        ColumnOf(Column("images", "images", "d"), lambda r: len(r.images)),
        ColumnOf(Column("diverged_images", "diverged", "d"), lambda r: list(r.states.values()).count("diverged")),
        ColumnOf(Column("failed_images", "failed", "d"), lambda r: list(r.states.values()).count("failed")),
        ColumnOf(Column("particles", "particles", "d"), lambda r: r.num_samples),
    ]


def metric_title(metric: str) -> tuple[str, str, str, str]:
    """Title ("PSNR aligned"), suffix of keys, unit in brackets, and format of a metric."""
    name, key_unit, unit, spec = UNITS[metric.removesuffix("_aligned")]
    return f"{name} aligned" if metric.endswith("_aligned") else f"{name} raw", key_unit, unit, spec


def _metric_entries(metric: str) -> list[ColumnOf]:
    title, key_unit, unit, spec = metric_title(metric)

    def entry(field: str) -> ColumnOf:
        column = Column(f"{metric}_{field}{key_unit}", f"{title} {field}{unit}", spec, with_error=True)
        return ColumnOf(column, lambda r: estimate(r.values(metric, field)))

    spread = Column(f"{metric}_std{key_unit}", f"{title} std{unit}", spec)
    fields = [entry(field) for field in ("best", "mean", "selected")]
    return [*fields, ColumnOf(spread, lambda r: estimate(r.values(metric, "std")).mean)]


def _misfit_entry() -> ColumnOf:
    def lowest(run: Run) -> Estimate:
        return estimate(min(image.loss) if image.loss else None for image in run.images.values())

    return ColumnOf(Column("misfit_best", "misfit best", ".1f", with_error=True), lowest)


def _success_entries() -> list[ColumnOf]:
    return [
        _image_entry("success_rate", "success", "success"),
        _image_entry("particle_success_rate", "particle success", "solved_fraction"),
        _image_entry("coverage", "coverage", "coverage"),
    ]


def _image_entry(key: str, title: str, field: str) -> ColumnOf:
    """Mean of a field over the images that have it."""

    def over_images(run: Run) -> Estimate:
        values = (getattr(image, field) for image in run.images.values())
        return estimate(None if value is None else float(value) for value in values)

    return ColumnOf(Column(key, title, ".2f", with_error=True), over_images)


def _cost_entries() -> list[ColumnOf]:
    def iterations(run: Run) -> int | None:
        counts = [i.iterations for i in run.images.values() if i.iterations is not None]
        return sum(counts) if counts else None

    def peak(run: Run) -> float | None:
        return max((p.peak_vram_mb for p in run.phases.values() if p.peak_vram_mb is not None), default=None)

    return [
        _image_entry("seconds_per_image", "s/image", "seconds"),
        ColumnOf(Column("peak_vram_mb", "peak VRAM [MB]", ".0f"), peak),
        ColumnOf(Column("optimization_iterations", "opt. iterations", "d"), iterations),
        ColumnOf(
            Column("pairwise_distance", "pairwise distance", ".4g"),
            lambda r: estimate(x.distance for x in r.repulsion).mean,
        ),
    ]


def _phase_names(runs: list[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.phases))


def _phase_entries(name: str) -> list[ColumnOf]:
    def fact(field: str) -> Callable[[Run], Cell]:
        return lambda r: getattr(r.phases[name], field) if name in r.phases else None

    return [
        ColumnOf(Column(f"{name}_seconds", f"{name} [s]", ".2f"), fact("seconds")),
        ColumnOf(Column(f"{name}_steps", f"{name} steps", "d"), fact("steps")),
        ColumnOf(Column(f"{name}_peak_vram_mb", f"{name} peak VRAM [MB]", ".0f"), fact("peak_vram_mb")),
    ]
