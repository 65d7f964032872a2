r"""Quality against cost of finished runs: one curve a setting, one point a run, paired over images.

    python tools/plot_cost.py --curve ours selected results/ours10 results/ours30 \
        --curve "Exp0, oracle" best results/exp0_10 results/exp0a,results/exp0b@13000 --output curve.png

A point is PSNR in dB over the images that all runs have, mean and standard error: ``selected`` is the answer chosen
without the truth, ``best`` the best particle by the truth, both raw; ``best_aligned`` the best particle by the truth,
which may turn it. Cost is decoder calls with gradient an image, all particles together; ``@13000`` names them for runs
that did not count. Runs between commas are one run over their images. Behind the curve stands the difference to the
last point of the last curve, image by image.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from particledaps.reports.comparison import (
    ComparisonError,
    Estimate,
    Measurements,
    common_images,
    estimate,
    paired_difference,
    partners,
)
from particledaps.reports.finished_runs import ResultsError, join_runs
from particledaps.reports.read_metrics import read_run

QUANTITIES = {"selected": ("psnr", "selected"), "best": ("psnr", "best"), "best_aligned": ("psnr_aligned", "best")}


class Point(NamedTuple):
    """One run of a curve.

    Attributes:
        label: of the curve.
        quantity: one of :data:`QUANTITIES`.
        calls: image id -> decoder calls with gradient.
        psnr: image id -> PSNR in dB.
        seconds: image id -> seconds.
        measurements: what the run reconstructed.
    """

    label: str
    quantity: str
    calls: dict[int, float]
    psnr: dict[int, float | None]
    seconds: dict[int, float]
    measurements: Measurements

    @property
    def cost(self) -> float:
        """Mean of the calls."""
        return statistics.fmean(self.calls.values())


def read_point(label: str, quantity: str, argument: str) -> Point:
    """The point of ``RUN[,RUN...][@CALLS]``.

    Raises:
        ResultsError: a run cannot be read, or nobody counted its calls.
    """
    paths, _, named = argument.partition("@")
    if named and not named.isdecimal():
        raise ResultsError(f"{argument}: the number of calls behind @ is no number: {named}")
    run = join_runs([read_run(Path(path)) for path in paths.split(",")])
    calls = {i: float(named) if named else image.calls for i, image in run.images.items()}
    if None in calls.values():
        raise ResultsError(f"{paths} did not count its calls; name them: {paths}@CALLS")
    psnr = {i: image.value(*QUANTITIES[quantity]) for i, image in run.images.items()}
    seconds = {i: image.seconds for i, image in run.images.items()}
    return Point(label, quantity, calls, psnr, seconds, run.measurements)


def only_common_images(points: list[Point]) -> list[Point]:
    """The points over the images of all of them.

    Raises:
        ResultsError: there is no such image.
        ComparisonError: two runs did not see the same measurements.
    """
    reference = points[-1].measurements
    ids = [partners(reference, point.measurements) for point in points]
    for point in points[:-1]:
        common_images(reference, point.measurements)
    scored = [
        {own[i] for i, v in p.psnr.items() if v is not None and i in own} for p, own in zip(points, ids, strict=True)
    ]
    kept = sorted(set.intersection(*scored))
    if not kept:
        raise ResultsError("the runs have no image in common")

    def cut(values: dict[int, float], own: dict[int, int]) -> dict[int, float]:
        renamed = {own[i]: value for i, value in values.items() if i in own}
        return {i: renamed[i] for i in kept}

    return [
        p._replace(calls=cut(p.calls, own), psnr=cut(p.psnr, own), seconds=cut(p.seconds, own))
        for p, own in zip(points, ids, strict=True)
    ]


def draw(points: list[Point]) -> Figure:
    """PSNR over calls, logarithmic."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    for label in dict.fromkeys(p.label for p in points):
        own = sorted((p for p in points if p.label == label), key=lambda p: p.cost)
        estimates = [estimate(p.psnr.values()) for p in own]
        bars = [e.standard_error or 0 for e in estimates]
        axis.errorbar([p.cost for p in own], [e.mean for e in estimates], bars, marker="o", capsize=3, label=label)
    axis.set(xscale="log", xlabel="decoder calls an image, all particles", ylabel="PSNR in dB (mean, standard error)")
    axis.set_xticks(tick_places([p.cost for p in points]), minor=False)
    axis.xaxis.set_major_formatter(lambda calls, _: f"{calls:,.0f}".replace(",", " "))
    axis.set_xticks([], minor=True)
    axis.set_title(f"the same {len(points[0].psnr)} images everywhere", fontsize=9)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def tick_places(calls: list[float]) -> list[float]:
    """Some of the points' own places, no two of them nearer than a factor of 1.3."""
    places: list[float] = []
    for value in sorted(calls):
        if not places or value >= 1.3 * places[-1]:
            places.append(value)
    return places


def table(points: list[Point]) -> str:
    """One row a point."""
    reference = points[-1]
    lines = ["| curve | calls | PSNR, dB | difference to the last row | seconds |", "|---|---|---|---|---|"]
    for p in points:
        cells = [estimate(p.psnr.values()), paired_difference(reference.psnr, p.psnr), estimate(p.seconds.values())]
        psnr, difference, seconds = (written(cell) for cell in cells)
        lines.append(f"| {p.label} | {p.cost:.0f} | {psnr} | {difference} | {seconds} |")
    return "\n".join(lines)


def written(value: Estimate) -> str:
    """Mean and standard error."""
    error = "" if value.standard_error is None else f" ({value.standard_error:.2f})"
    return f"{value.mean:.2f}{error}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--curve",
        nargs="+",
        action="append",
        required=True,
        metavar="...",
        help=f"a label, one of {', '.join(QUANTITIES)}, then runs: RUN[,RUN...][@CALLS]",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the plot there, as PNG")
    arguments = parser.parse_args()
    for label, *rest in arguments.curve:
        if len(rest) < 2 or rest[0] not in QUANTITIES:
            parser.error(f"--curve {label}: takes a label, one of {', '.join(QUANTITIES)}, and at least one run")
    try:
        points = [read_point(label, q, run) for label, q, *runs in arguments.curve for run in runs]
        points = only_common_images(points)
    except (ComparisonError, ResultsError) as error:
        parser.exit(2, f"{error}\n")
    print(table(points))
    if arguments.output is not None:
        draw(points).savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
