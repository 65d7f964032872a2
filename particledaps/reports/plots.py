"""Plots of finished runs: repulsion over the annealing, data misfit and PSNR over particles."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from particledaps.reports.finished_runs import RepulsionRow, Run
from particledaps.reports.summary import label_runs

Values = dict[str, list[float]]


def write_plots(folder: Path, runs: list[Run]) -> tuple[list[Path], list[str]]:
    """Write ``pairwise_distance``, ``repulsion_ratio``, ``data_misfit`` and ``psnr_particles`` as PNGs.

    Args:
        folder: made where it does not exist.
        runs: finished runs; those that lack the data of a plot are left out of it.

    Returns:
        The files written, and one note for each run or plot that is left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, notes = [], []
    labels = [label.replace("$", r"\$") for label in label_runs(runs)]  # not a formula
    for name, gather, draw in PLOTS:
        data = {label: gather(run) for label, run in zip(labels, runs, strict=True)}
        kept = {label: values for label, values in data.items() if values}
        if kept:
            notes += [f"{name}.png leaves out {label}: {LACKS[name]}" for label in labels if label not in kept]
            draw(kept).savefig(folder / f"{name}.png", dpi=110)
            written.append(folder / f"{name}.png")
        else:
            notes.append(f"{name}.png is not written: {LACKS[name]} in any run")
    return written, notes


def mean_per_t(run: Run, value: Callable[[RepulsionRow], float | None]) -> list[tuple[float, float]]:
    """``(t, mean over images)`` of a logged value, t falling from 1000 to 0."""
    found: dict[float, list[float]] = {}
    for row in run.repulsion:
        if value(row) is not None:
            found.setdefault(row.t, []).append(value(row))
    return [(t, statistics.fmean(found[t])) for t in sorted(found, reverse=True)]


def misfits(run: Run) -> list[float]:
    """Final loss minus noise floor of every surviving particle (sum of squared residuals)."""
    return [loss - image.fingerprint.noise_floor for image in run.images.values() for loss in image.loss]


def psnrs(run: Run) -> list[tuple[float, float]]:
    """Raw and aligned PSNR in dB of every surviving particle."""
    images = [i.quality for i in run.images.values() if "psnr" in i.quality and "psnr_aligned" in i.quality]
    return [pair for q in images for pair in zip(q["psnr"].samples, q["psnr_aligned"].samples, strict=True)]


def _lines(series: dict[str, list[tuple[float, float]]], title: str) -> Figure:
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for label, points in series.items():
        axis.plot(*zip(*points, strict=True), marker=".", label=label)
    axis.invert_xaxis()  # the annealing runs from t = 1000 to 0
    axis.set(xlabel="t", ylabel=title)
    axis.legend(fontsize=8)
    return figure


def _boxes(axis: Axes, data: Values, title: str) -> None:
    """A box a run over its particles, and every particle as a point."""
    positions = list(range(1, len(data) + 1))
    axis.boxplot(list(data.values()), positions=positions, widths=0.5, showfliers=False)
    for position, values in zip(positions, data.values(), strict=True):
        spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
        axis.plot(position + spread, values, ".", alpha=0.5)
    axis.set_xticks(positions, list(data), rotation=30, ha="right", fontsize=8)
    axis.set_title(title, fontsize=9)


def _distance_figure(series: dict[str, list[tuple[float, float]]]) -> Figure:
    return _lines(series, "mean pairwise distance in feature space")


def _ratio_figure(series: dict[str, list[tuple[float, float]]]) -> Figure:
    return _lines(series, "norm of repulsion over norm of score")


def _misfit_figure(data: Values) -> Figure:
    figure = Figure(figsize=(2.5 + 1.1 * len(data), 4.5), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="grey", linewidth=0.8)
    _boxes(axis, data, "final loss minus noise floor, per particle")
    sizes = [abs(v) for values in data.values() for v in values]
    typical = statistics.median(sizes)
    if max(sizes) > 30 * typical > 0:  # a solved image lies around 0, a lost one orders above
        axis.set_yscale("symlog", linthresh=typical)
    return figure


def _psnr_figure(data: dict[str, list[tuple[float, float]]]) -> Figure:
    figure = Figure(figsize=(3.5 + 2 * len(data), 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for column, (axis, name) in enumerate(zip(axes, ("raw", "aligned"), strict=True)):
        _boxes(axis, {label: [p[column] for p in rows] for label, rows in data.items()}, f"PSNR {name}, per particle")
    axes[0].set_ylabel("dB")
    return figure


PLOTS = (
    ("pairwise_distance", lambda run: mean_per_t(run, lambda row: row.distance), _distance_figure),
    ("repulsion_ratio", lambda run: mean_per_t(run, lambda row: row.ratio), _ratio_figure),
    ("data_misfit", misfits, _misfit_figure),
    ("psnr_particles", psnrs, _psnr_figure),
)
LACKS = {
    "pairwise_distance": "no repulsion rows",
    "repulsion_ratio": "no repulsion rows",
    "data_misfit": "no surviving particle",
    "psnr_particles": "no particle with a known truth",
}
