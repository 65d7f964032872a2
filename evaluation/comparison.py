"""Statistics over images: means with standard errors, and paired differences between two runs."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

TOLERANCE = 1e-5  # relative; float sums of one measurement differ by less between devices


class ComparisonError(ValueError):
    """Two runs cannot be paired; the message says why."""


class Estimate(NamedTuple):
    """A mean over images.

    Attributes:
        mean: None without values.
        standard_error: sample standard deviation (n - 1) over sqrt(n), None below two values; the unit of the mean.
        count: number of values.
    """

    mean: float | None
    standard_error: float | None
    count: int


def estimate(values: Iterable[float | None]) -> Estimate:
    r"""Mean and standard error :math:`\sqrt{\sum (v - \bar v)^2 / (n - 1) / n}`.

    Args:
        values: one value an image, in any unit; None where an image has none, which is left out.
    """
    kept = [v for v in values if v is not None]
    if not kept:
        return Estimate(None, None, 0)
    count, mean = len(kept), math.fsum(kept) / len(kept)
    if count == 1:
        return Estimate(mean, None, 1)
    variance = math.fsum((v - mean) ** 2 for v in kept) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def pairs(first: Mapping[int, float | None], other: Mapping[int, float | None]) -> list[tuple[float, float]]:
    """``(first, other)`` of every image id that has a value in both."""
    both = ((first[i], other[i]) for i in sorted(first.keys() & other.keys()))
    return [(a, b) for a, b in both if a is not None and b is not None]


def paired_difference(first: Mapping[int, float | None], other: Mapping[int, float | None]) -> Estimate:
    """Mean of ``other - first`` over the images of both, in the unit of the values.

    The standard error is that of the differences: what an image adds to both runs, being easy or hard, cancels.

    Args:
        first: image id -> value.
        other: image id -> value.
    """
    return estimate(b - a for a, b in pairs(first, other))


def paired_ratio(first: Mapping[int, float | None], other: Mapping[int, float | None]) -> Estimate:
    """Mean of ``other / first`` over the images of both (a pure number); an image with ``first = 0`` is left out.

    Args:
        first: image id -> value.
        other: image id -> value.
    """
    return estimate(b / a for a, b in pairs(first, other) if a)


class Fingerprint(NamedTuple):
    """What tells one measurement from another.

    Attributes:
        mean_rms: mean and root mean square of y, in the unit of y; None in files that lack it.
        noise_floor: loss expected at the truth (sum of squared residuals).
    """

    mean_rms: tuple[float, float] | None
    noise_floor: float


@dataclass(frozen=True)
class Measurements:
    """The measurements of a run.

    Attributes:
        name: name of the run, for messages.
        conditions: what every measurement shares (noise level, oversampling, range, seed).
        fingerprints: image id -> fingerprint.
    """

    name: str
    conditions: dict[str, Any]
    fingerprints: dict[int, Fingerprint]


def common_images(first: Measurements, other: Measurements) -> list[int]:
    """Ids of the images that both runs reconstructed, from equal measurements.

    Raises:
        ComparisonError: no image is common, or a measurement differs (``TOLERANCE``, relative).
    """
    cannot = f"cannot pair {other.name} with {first.name}"
    for key, value in first.conditions.items():
        if other.conditions[key] != value:
            raise ComparisonError(f"{cannot}: {key} is {other.conditions[key]!r} there and {value!r} in {first.name}")
    common = sorted(first.fingerprints.keys() & other.fingerprints.keys())
    if not common:
        raise ComparisonError(f"{cannot}: they have no image in common")
    for image_id in common:
        _check_same(first.fingerprints[image_id], other.fingerprints[image_id], f"{cannot}: of image {image_id} ")
    return common


def without_fingerprint(first: Measurements, other: Measurements, common: Iterable[int]) -> list[int]:
    """Those of the images ``common`` that ``common_images`` could match by noise floor only."""
    return [i for i in common if None in (first.fingerprints[i].mean_rms, other.fingerprints[i].mean_rms)]


def _check_same(first: Fingerprint, other: Fingerprint, where: str) -> None:
    names, values = ["noise floor"], [(first.noise_floor, other.noise_floor)]
    if first.mean_rms is not None and other.mean_rms is not None:
        names += ["mean of y", "root mean square of y"]
        values += zip(first.mean_rms, other.mean_rms, strict=True)
    for name, (a, b) in zip(names, values, strict=True):
        if not math.isclose(a, b, rel_tol=TOLERANCE):
            raise ComparisonError(f"{where}the {name} differs ({b:.8g} against {a:.8g})")
