r"""Can these be the Fourier magnitudes of an image? What every image in [0, 1] obeys, and what breaks it.

For an image x in [0, 1] on a support of n pixels inside a plane of N, orthonormal transform, y(0) its magnitude at
frequency 0:

.. math:: \frac{N}{n} y(0)^2 \le \sum y^2 \le \sqrt{N} y(0), \qquad y(0) = \max y \le \frac{n}{\sqrt N}

The first is Cauchy and Schwarz, the second x^2 <= x, both with Parseval; the mean of a non-negative image is its
largest coefficient. All hold for the measured y less its noise, with :data:`ROOM` standard deviations of room.
Squared magnitudes break the first, another scale the second or the last, another order of frequencies the third.

NaN stands for what was not measured. Sums and maxima run over the rest, so the first bound, which needs all of the
power, asks for a whole plane, and a plane without frequency 0 is believed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

ROOM = 5.0
ROUNDING = 1e-5
BACKGROUND = 0.01
"""Squares lie above 0, but for a background of so much of the largest that was taken off."""
FORMS, ORIGINS = ("amplitude", "intensity"), ("centre", "corner")


@dataclass(frozen=True)
class Convention:
    """How magnitudes are written down.

    Attributes:
        measurement: ``amplitude``, or ``intensity`` (their squares).
        origin: frequency 0 in the ``centre`` of the plane or in its ``corner``.
    """

    measurement: str = "amplitude"
    origin: str = "centre"

    def __str__(self) -> str:
        return f"{self.measurement}, frequency 0 in the {self.origin}"


CONVENTIONS = tuple(Convention(form, origin) for origin in ORIGINS for form in FORMS)


def to_centred_amplitude(y: torch.Tensor, convention: Convention) -> torch.Tensor:
    """Magnitudes ``(..., H, W)`` in ``convention`` as this project keeps them; intensities below 0 count as 0."""
    amplitude = y if convention.measurement == "amplitude" else y.clamp(min=0).sqrt()
    return amplitude if convention.origin == "centre" else torch.fft.fftshift(amplitude, dim=(-2, -1))


@dataclass(frozen=True)
class Bounds:
    """The bounds on one plane, each with room for noise.

    Attributes:
        at_zero: y(0); NaN if it was not measured.
        smallest: the smallest entry.
        largest: the largest entry.
        power: sum of squares less that of the noise.
        support: n, pixels of the image.
        plane: N, entries of the plane.
        measured: how many of them were measured.
        sigma: standard deviation of the noise on each entry, for the room.
    """

    at_zero: float
    smallest: float
    largest: float
    power: float
    support: int
    plane: int
    measured: int
    sigma: float

    @property
    def stands_clear(self) -> bool:
        """Is there anything at frequency 0?"""
        return self.at_zero > ROOM * self.sigma

    @property
    def is_empty(self) -> bool:
        """Is there nothing but noise at any frequency?"""
        return self.largest <= (ROOM + 2) * self.sigma

    @property
    def power_std(self) -> float:
        """Standard deviation of ``power``, of which the noise's part is itself estimated, and its rounding."""
        noise = 4 * self.sigma**2 * max(self.power, 0.0) + 4 * self.measured * self.sigma**4
        return math.hypot(math.sqrt(noise), ROUNDING * self.power)

    @property
    def spread_enough(self) -> bool:
        """``N / n y(0)^2 <= power``: no more can stand at frequency 0 (if all of the power was measured)."""
        if self.measured < self.plane:
            return True
        ratio = self.plane / self.support
        room = math.hypot(2 * ratio * self.at_zero * self.sigma, self.power_std)
        return ratio * self.at_zero**2 - self.power <= ROOM * room

    @property
    def power_fits(self) -> bool:
        """``power <= sqrt(N) y(0)``: pixels are at most 1."""
        room = math.hypot(math.sqrt(self.plane) * self.sigma, self.power_std)
        return self.power - math.sqrt(self.plane) * self.at_zero <= ROOM * room

    @property
    def is_largest(self) -> bool:
        """No other frequency is stronger."""
        return self.largest - self.at_zero <= ROOM * math.sqrt(2) * self.sigma

    @property
    def mean_fits(self) -> bool:
        """``y(0) <= n / sqrt(N)``: the mean of the pixels is at most 1."""
        return self.at_zero - self.support / math.sqrt(self.plane) <= ROOM * self.sigma

    @property
    def is_positive(self) -> bool:
        """No entry lies below 0 by more than noise (of thousands of entries) would."""
        return self.smallest >= -(ROOM + 2) * self.sigma

    @property
    def hold(self) -> bool:
        """All of them."""
        possible = self.spread_enough and self.power_fits and self.is_largest and self.mean_fits
        return self.stands_clear and possible and self.is_positive

    @property
    def largest_scale(self) -> float:
        """The largest factor on y with which the bounds on scale would hold."""
        root = math.sqrt(self.plane)
        if not (self.power > 0 and self.at_zero > 0):
            return 0.0
        return min(root * self.at_zero / self.power, self.support / root / self.at_zero)

    def scaled(self, factor: float) -> Bounds:
        """Of ``factor * y`` with noise of the same relative size."""
        values = (self.at_zero * factor, self.smallest * factor, self.largest * factor, self.power * factor**2)
        return Bounds(*values, self.support, self.plane, self.measured, self.sigma * factor)


def bounds(y: torch.Tensor, image_shape: tuple[int, int, int], sigma: float) -> list[Bounds]:
    """Of every channel of a centred plane of amplitudes ``y`` ``(C, H, W)``.

    The noise's power is what the conjugate pairs of ``y`` show; ``sigma`` gives the room where it is more than that.
    """
    height, width = y.shape[-2:]
    support, plane = image_shape[-2] * image_shape[-1], height * width
    revealed = pair_noise(y)
    noise = sigma if math.isnan(revealed) else revealed
    found = []
    for channel in y.double():
        entries = channel[~channel.isnan()]
        power = entries.square().sum().item() - len(entries) * noise**2
        low, high = (entries.min().item(), entries.max().item()) if len(entries) else (0.0, 0.0)
        values = (channel[height // 2, width // 2].item(), low, high, power)
        found.append(Bounds(*values, support, plane, len(entries), max(sigma, noise)))
    return found


def pair_noise(y: torch.Tensor) -> float:
    """Standard deviation of the noise by the differences of conjugate entries of a centred plane ``(C, H, W)``.

    NaN where no pair was measured.
    """
    corner = torch.fft.ifftshift(y.double(), dim=(-2, -1))
    difference = corner - corner.flip((-2, -1)).roll((1, 1), dims=(-2, -1))
    return (difference.square().nanmean() / 2).sqrt().item()


@dataclass(frozen=True)
class Doubt:
    """Why ``y`` is not the magnitudes of an image, and what it may be instead.

    Attributes:
        channel: the first one that is impossible.
        bounds: of that channel.
        looks_like: the convention in which every channel is possible, if there is one.
        largest_scale: with a factor of at most this on the amplitudes; None: as they are.
        usual: such a factor that undoes a usual choice, and its name; None: there is none.
    """

    channel: int
    bounds: Bounds
    looks_like: Convention | None = None
    largest_scale: float | None = None
    usual: tuple[float, str] | None = None


def doubt(y: torch.Tensor, image_shape: tuple[int, int, int], sigma: float, given: Convention) -> Doubt | None:
    """Reasons to believe that ``y`` ``(C, H, W)``, in the convention ``given``, is something else; None if it can be.

    ``y`` is NaN where it was not measured, and not everywhere.

    A plane with nothing at frequency 0 (a beam stop) is believed, unless another convention finds it there.
    """
    own = bounds(to_centred_amplitude(y, given), image_shape, sigma)
    wrong = [i for i, b in enumerate(own) if (b.stands_clear and not b.hold) or not b.is_positive]
    if not wrong and any(b.stands_clear for b in own):
        return None
    broken = wrong[0] if wrong else 0
    found = own[broken]
    if not wrong:  # nothing at frequency 0: a beam stop, unless it stands where another order puts it
        elsewhere = [c for c in CONVENTIONS if c.origin != given.origin and _anything_at_zero(y, c, image_shape, sigma)]
        return _recognised(y, image_shape, sigma, elsewhere, broken, found)
    others = [given, *(c for c in CONVENTIONS if c != given)]
    return _recognised(y, image_shape, sigma, others, broken, found) or Doubt(broken, found)


def _recognised(
    y: torch.Tensor,
    image_shape: tuple[int, int, int],
    sigma: float,
    conventions: Sequence[Convention],
    broken: int,
    found: Bounds,
) -> Doubt | None:
    """The first convention in which every channel is possible as it is, else the first one in another scale."""
    entries = y[~y.isnan()]
    if entries.min() < -BACKGROUND * entries.max():
        conventions = [c for c in conventions if c.measurement == "amplitude"]
    for convention in conventions:
        if _possible(y, convention, image_shape, sigma):
            return Doubt(broken, found, convention)
    known = known_scales(y.shape[-2] * y.shape[-1])
    for convention in conventions:
        plain = bounds(to_centred_amplitude(y, convention), image_shape, 0.0)  # sigma's scale is unknown, too
        largest = min(b.largest_scale for b in plain)
        if largest > 0 and all(b.scaled(largest * (1 - 1e-9)).hold for b in plain):
            usual = [f for f in known if largest / 16 < f <= largest]
            nearest = min(usual, key=lambda f: abs(math.log(2 * f / largest)), default=None)
            named = None if nearest is None else (nearest, known[nearest])
            return Doubt(broken, found, convention, largest, named)
    return None


def _anything_at_zero(y: torch.Tensor, convention: Convention, image_shape: tuple[int, int, int], sigma: float) -> bool:
    return any(b.stands_clear for b in bounds(to_centred_amplitude(y, convention), image_shape, sigma))


def _possible(y: torch.Tensor, convention: Convention, image_shape: tuple[int, int, int], sigma: float) -> bool:
    """Does every channel obey the bounds, or hold nothing?"""
    own = bounds(to_centred_amplitude(y, convention), image_shape, sigma)
    return any(b.stands_clear for b in own) and all(b.hold or b.is_empty for b in own)


def known_scales(plane: int) -> dict[float, str]:
    """Factors on amplitudes of ``plane`` entries that undo a usual choice of scale."""
    root = math.sqrt(plane)
    return {
        1 / root: "the transform is not orthonormal (norm='ortho')",
        root: "the transform is divided by the number of entries (norm='forward')",
        1 / 255: "the image is on the scale 0 to 255",
        1 / (255 * root): "the image is on the scale 0 to 255 and the transform is not orthonormal",
        1 / 65535: "the image is on the scale 0 to 65535",
    }
