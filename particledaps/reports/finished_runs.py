"""Finished runs as ``tools/parse_metrics.py`` sees them, and their join over images."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from particledaps.reports.comparison import Fingerprint, Measurements

METRICS = tuple(name + suffix for name in ("psnr", "ssim", "lpips") for suffix in ("", "_aligned"))


class ResultsError(ValueError):
    """A file is no finished run of schema 1, or runs cannot be joined; the message is one sentence."""


@dataclass(frozen=True)
class Quality:
    """One metric of one image: PSNR in dB, SSIM and LPIPS without unit.

    Attributes:
        samples: one value a surviving particle; empty where all diverged, and then the rest is None.
        best: the best sample.
        mean: mean over particles.
        std: standard deviation (n - 1) over particles, None below two.
        selected: value of the particle that was chosen without the truth.
    """

    samples: list[float]
    best: float | None
    mean: float | None
    std: float | None
    selected: float | None


@dataclass(frozen=True)
class ImageResult:
    """One image of a run.

    Attributes:
        quality: metric name -> quality; metrics that were not computed are missing.
        solved: whether each particle solves it; None without truth.
        coverage: number of distinct solved modes, None without truth.
        loss: final sum of squared residuals of each particle.
        fingerprint: of its measurement.
        seconds: time it took.
        calls: decoder calls with gradient, None where they were not counted.
        iterations: of the latent optimisation over all particles, None without it.
        source: name of its input in its data set; None in older files.
        sha256: of its input; None in older files.
        cpu_seconds: what the process computed in that time, on all threads together; None in older files.
    """

    quality: dict[str, Quality]
    solved: list[bool] | None
    coverage: float | None
    loss: list[float]
    fingerprint: Fingerprint
    seconds: float
    calls: int | None
    iterations: int | None
    source: str | None = None
    sha256: str | None = None
    cpu_seconds: float | None = None

    @property
    def success(self) -> bool | None:
        """Does a particle solve it? None without truth."""
        if self.solved is not None:
            return any(self.solved)
        return None if self.coverage is None else self.coverage > 0

    @property
    def solved_fraction(self) -> float | None:
        """Share of the surviving particles that solve it, in [0, 1]; None without truth or particles.

        A run's "particle success" is its mean over images, in which each image counts the same.
        """
        return sum(self.solved) / len(self.solved) if self.solved else None

    def value(self, metric: str, field: str) -> float | None:
        """``best``, ``mean``, ``std`` or ``selected`` of a metric; None where there is none."""
        return getattr(self.quality[metric], field) if metric in self.quality else None


class Phase(NamedTuple):
    """One phase of a run, over all images: seconds, sigma steps, and peak VRAM in MB (None on a CPU)."""

    seconds: float
    steps: int
    peak_vram_mb: float | None


class RepulsionRow(NamedTuple):
    """One logged repulsion step of one image: t, mean pairwise distance, and norm of repulsion over norm of score."""

    t: float
    distance: float | None
    ratio: float | None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: its name.
        path: where it was read from.
        config_sha256: hash of what determines its numbers.
        conditions: what all its measurements share.
        num_samples: particles at the start.
        images: image id -> result, failed images excluded.
        states: image id -> "ok", "diverged" or "failed".
        phases: phase name -> phase.
        repulsion: logged rows.
    """

    name: str
    path: str
    config_sha256: str
    conditions: dict[str, Any]
    num_samples: int
    images: dict[int, ImageResult]
    states: dict[int, str]
    phases: dict[str, Phase]
    repulsion: list[RepulsionRow]

    @property
    def measurements(self) -> Measurements:
        """What decides whether two runs can be paired."""
        inputs = {i: r.source for i, r in self.images.items() if r.source is not None}
        return Measurements(self.name, self.conditions, {i: r.fingerprint for i, r in self.images.items()}, inputs)

    def with_ids(self, ids: dict[int, int]) -> Run:
        """The images that ``ids`` names, under their new ids."""
        return dataclasses.replace(self, images={ids[i]: image for i, image in self.images.items() if i in ids})

    def values(self, metric: str, field: str) -> list[float | None]:
        """One field of a metric, an entry an image."""
        return [image.value(metric, field) for image in self.images.values()]


def join_runs(parts: list[Run]) -> Run:
    """One run from parts with one configuration over different images.

    Seconds of a phase add up, peaks of VRAM take the maximum; a metric that a part lacks is left out, as in a run.

    Raises:
        ResultsError: configurations differ, or an image is in two parts.
    """
    joined = parts[0]
    for part in parts[1:]:
        joined = _join_two(joined, part)
    shared = set(METRICS).intersection(*(image.quality for image in joined.images.values()))
    return dataclasses.replace(
        joined,
        images={
            i: dataclasses.replace(image, quality={m: q for m, q in image.quality.items() if m in shared})
            for i, image in sorted(joined.images.items())
        },
    )


def _join_two(first: Run, other: Run) -> Run:
    cannot = f"cannot join {first.path} and {other.path}"
    if first.config_sha256 != other.config_sha256:
        hashes = f"{first.config_sha256[:8]} and {other.config_sha256[:8]}"
        raise ResultsError(f"{cannot}: their configurations differ (config_sha256 {hashes})")
    overlap = sorted(first.images.keys() & other.images.keys())
    if overlap:
        raise ResultsError(f"{cannot}: both hold image {overlap[0]}")
    names = {i.source: i for i in first.images.values() if i.source is not None}
    for image_id, image in other.images.items():
        if (twin := names.get(image.source)) is not None and twin.sha256 == image.sha256:
            raise ResultsError(f"{cannot}: both hold {image.source} (image {image_id} of the second)")
    failed_later = {i: s for i, s in other.states.items() if i not in first.images}
    return dataclasses.replace(
        first,
        name=first.name if other.name in first.name.split("+") else f"{first.name}+{other.name}",
        path=f"{first.path},{other.path}",
        images=first.images | other.images,
        states=first.states | failed_later,
        phases={
            name: _join_phase(first.phases.get(name), other.phases.get(name)) for name in first.phases | other.phases
        },
        repulsion=first.repulsion + other.repulsion,
    )


def _join_phase(first: Phase | None, other: Phase | None) -> Phase:
    if first is None or other is None:
        return first or other
    peaks = [p for p in (first.peak_vram_mb, other.peak_vram_mb) if p is not None]
    return Phase(first.seconds + other.seconds, first.steps + other.steps, max(peaks, default=None))
