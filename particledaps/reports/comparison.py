"""Statistics over images: means with standard errors, and paired differences between two runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
        inputs: image id -> name of its input in its data set; ids that are missing have none (older files).
    """

    name: str
    conditions: dict[str, Any]
    fingerprints: dict[int, Fingerprint]
    inputs: dict[int, str] = field(default_factory=dict)


def partners(first: Measurements, other: Measurements) -> dict[int, int]:
    """Ids of images in ``other`` -> ids of the same images in ``first``: by the names of their inputs.

    An image without a name, or one whose name ``first`` does not know, pairs with the one of its own id: where a name
    is missing, or where both are the same measurement under two names (a folder and an archive of one data set).
    """
    by_name = {name: i for i, name in first.inputs.items()}
    found = {i: by_name[name] for i, name in other.inputs.items() if name in by_name}
    taken = set(found.values())
    for i in other.fingerprints.keys() & first.fingerprints.keys():
        if i in found or i in taken:
            continue
        nameless = i not in first.inputs or i not in other.inputs
        if nameless or _difference(first.fingerprints[i], other.fingerprints[i]) is None:
            found[i] = i
    return found


def common_images(first: Measurements, other: Measurements) -> list[int]:
    """Ids in ``first`` of the images that both runs reconstructed, from equal measurements.

    Raises:
        ComparisonError: no image is common, or a measurement differs (``TOLERANCE``, relative).
    """
    cannot = f"cannot pair {other.name} with {first.name}"
    for key, value in first.conditions.items():
        if other.conditions[key] != value:
            raise ComparisonError(f"{cannot}: {key} is {other.conditions[key]!r} there and {value!r} in {first.name}")
    pairs_of_ids = partners(first, other)
    if not pairs_of_ids:
        raise ComparisonError(f"{cannot}: they have no image in common")
    for theirs, ours in sorted(pairs_of_ids.items(), key=lambda pair: pair[1]):
        difference = _difference(first.fingerprints[ours], other.fingerprints[theirs])
        if difference is not None:
            name = f" ({first.inputs[ours]})" if ours in first.inputs else ""
            raise ComparisonError(f"{cannot}: of image {ours}{name} {difference}")
    return sorted(pairs_of_ids.values())


def without_fingerprint(first: Measurements, other: Measurements) -> list[int]:
    """Ids in ``first`` of the common images that could be matched by their noise floor only."""
    found = partners(first, other).items()
    return sorted(a for b, a in found if None in (first.fingerprints[a].mean_rms, other.fingerprints[b].mean_rms))


def _difference(first: Fingerprint, other: Fingerprint) -> str | None:
    """In what two measurements differ, in words; None for equal ones."""
    names, values = ["noise floor"], [(first.noise_floor, other.noise_floor)]
    if first.mean_rms is not None and other.mean_rms is not None:
        names += ["mean of y", "root mean square of y"]
        values += zip(first.mean_rms, other.mean_rms, strict=True)
    for name, (a, b) in zip(names, values, strict=True):
        if not math.isclose(a, b, rel_tol=TOLERANCE):
            return f"the {name} differs ({b:.8g} against {a:.8g})"
    return None
