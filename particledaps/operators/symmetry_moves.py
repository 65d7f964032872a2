r"""Moves between images of (nearly) one Fourier amplitude: the ways in which a phase retrieval goes wrong.

A flip is the rotation by 180 degrees, ``(Fx)(k) -> e^{2 pi i (k_1 / H + k_2 / W)} conj((Fx)(k))`` on an ``H x W`` grid:
conjugation of the spectrum about the image's centre. All images are ``(P, C, H, W)``; nothing here knows a prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from particledaps.operators.phase_retrieval import mirror_frequencies, rotate_180

BANDS = ("disc", "ring", "wedge")
LOWEST_RADIUS = 1.5
LOW_RADII = (1.1, 4.0)
LOW_DISC_SHARE = 0.4
GOLDEN_RATIO = (1 + 5**0.5) / 2
WINDOW_SOFTNESS = 0.1
DrawBand = Callable[[int, int, "torch.Generator"], "torch.Tensor"]


def flip_channels(x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Rotate the channels ``chosen`` ``(P, C)`` by 180 degrees; amplitude exact, its own inverse."""
    return torch.where(chosen[..., None, None], rotate_180(x), x)


def reference_channel(x: torch.Tensor) -> torch.Tensor:
    """The channel of the largest variance, ``(P,)``; no flip changes it."""
    return x.flatten(2).var(-1).argmax(1)


def discordant_channels(x: torch.Tensor) -> torch.Tensor:
    """``(P, C)``: channels whose correlation with the reference channel rises by their flip; never the reference."""
    centred = x - x.mean((-2, -1), keepdim=True)
    rows = torch.arange(len(x), device=x.device)
    reference = reference_channel(x)
    against = centred[rows, reference][:, None]
    gain = ((rotate_180(centred) - centred) * against).flatten(2).sum(-1)
    gain[rows, reference] = 0
    return gain > 0


def frequency_grid(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Frequencies ``(H, 1)`` and ``(1, W)`` in cycles per pixel, frequency 0 in the corner."""
    return torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]


def ring(height: int, width: int, low: float, high: float) -> torch.Tensor:
    """``(H, W)``: frequencies of modulus ``low <= |k| < high`` cycles per pixel; a disc where ``low`` is 0."""
    rows, columns = frequency_grid(height, width)
    modulus = (rows.square() + columns.square()).sqrt()
    return (modulus >= low) & (modulus < high)


def wedge(height: int, width: int, angle: float, half_width: float) -> torch.Tensor:
    """``(H, W)``: frequencies whose direction is within ``half_width`` of ``angle`` (radians, modulo pi), without 0."""
    rows, columns = frequency_grid(height, width)
    direction = torch.atan2(rows.expand(height, width), columns.expand(height, width))
    apart = (direction - angle + math.pi / 2) % math.pi - math.pi / 2
    inside = (apart.abs() < half_width) & ((rows != 0) | (columns != 0))
    return inside & mirror_frequencies(inside)  # on the highest row and column one entry stands for both signs


def draw_band(height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """A random centrosymmetric set ``(H, W)`` of frequencies, on the CPU.

    A disc, a ring or a wedge with equal chance; radii are log-uniform from :data:`LOWEST_RADIUS` cycles an image to
    a quarter of the sampling rate, where a photograph keeps nearly all of its energy, and a ring is at least as wide
    as the smallest disc, so that it holds something; wedges are 20 to 90 degrees.
    """
    kind, first, second = torch.rand(3, generator=generator).tolist()
    name = BANDS[min(int(kind * len(BANDS)), len(BANDS) - 1)]
    if name == "wedge":
        return wedge(height, width, math.pi * first, math.radians(10 + 35 * second))
    lowest = LOWEST_RADIUS / min(height, width)
    low, high = sorted(lowest * (0.25 / lowest) ** u for u in (first, second))
    return ring(height, width, low, max(high, low + lowest)) if name == "ring" else ring(height, width, 0.0, high)


def draw_low_band(height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """A random centrosymmetric set ``(H, W)`` of the lowest frequencies, on the CPU: what survives re-noising.

    A disc, or its part within a wedge of 45 to 90 degrees, which is never empty; the radius is log-uniform in
    :data:`LOW_RADII` cycles an image, of a wedge at least :data:`LOWEST_RADIUS`.
    """
    kind, position, angle, opening = torch.rand(4, generator=generator).tolist()
    lowest, highest = LOW_RADII
    radius, cycle = lowest * (highest / lowest) ** position, 1 / min(height, width)
    if kind < LOW_DISC_SHARE:
        return ring(height, width, 0.0, radius * cycle)
    disc = ring(height, width, 0.0, max(radius, LOWEST_RADIUS) * cycle)
    return disc & wedge(height, width, math.pi * angle, math.pi / 8 * (1 + opening))


def conjugate_band(x: torch.Tensor, band: torch.Tensor) -> torch.Tensor:
    r"""Conjugate the spectrum about the image's centre on the frequencies of ``band``: flip that band alone.

    .. math:: x' = F^{-1} [ F(g x) \text{ on } Q, \; F x \text{ elsewhere} ]

    with g the flip. It swaps the twin to which the band belongs, which is the defect of a reconstruction that
    stagnated between both twins (Fienup and Wackerman 1986). It is its own inverse and orthogonal, and ``|F x|`` on
    the grid of ``band`` is unchanged to rounding. A phase retrieval measures ``|F P x|``, the amplitude on the larger
    grid of the padded image: where ``band`` has the image's size, ``x'`` keeps its support, but only the amplitude on
    the coarse grid. Where ``band`` is larger, the image is padded to its size, on which the amplitude is exact before
    ``x'`` is cropped, and not afterwards; the move then is its own inverse before the crop only. Either way the
    measured amplitude is changed, and the data loss has to decide.

    Args:
        x: ``(P, C, H, W)``.
        band: ``(H', W')``, or ``(P, H', W')`` for one set a particle: true on a centrosymmetric set of frequencies in
            ``fft2`` layout; H' - H and W' - W even and not negative.
    """
    rows, columns = ((b - n) // 2 for b, n in zip(band.shape[-2:], x.shape[-2:], strict=True))
    plane = torch.nn.functional.pad(x, (columns, columns, rows, rows))
    difference = torch.fft.fft2(rotate_180(plane) - plane)
    chosen = band[:, None] if band.ndim == 3 else band
    moved = plane + torch.fft.ifft2(difference * chosen).real
    return moved[..., rows : rows + x.shape[-2], columns : columns + x.shape[-1]]


def conjugate_drawn_bands(x: torch.Tensor, draw: DrawBand, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """:func:`conjugate_band` with a band of its own for each of the images, drawn from its CPU generator.

    Args:
        x: ``(P, C, H, W)``.
        draw: :func:`draw_band` or :func:`draw_low_band`.
        generators: P of them.
    """
    height, width = x.shape[-2:]
    bands = torch.stack([draw(height, width, generator) for generator in generators])
    return conjugate_band(x, bands.to(x.device))


def half_plane_window(height: int, width: int, angle: float) -> torch.Tensor:
    """``(H, W)``: 1 on one side of a line through the centre, 0 on the other, soft between them; w + flip(w) = 1.

    Args:
        height: of the image.
        width: of the image.
        angle: in radians, of the direction in which the window grows.
    """
    rows, columns = (torch.linspace(-1, 1, n, dtype=torch.float64) for n in (height, width))
    along = math.sin(angle) * rows[:, None] + math.cos(angle) * columns[None]
    return torch.sigmoid(along / WINDOW_SOFTNESS).float()


def window_angle(particle_id: int) -> float:
    """The angle of a particle's window: multiples of the golden angle from the diagonal, so that no two are near."""
    return math.pi / 4 + 2 * math.pi * ((particle_id / GOLDEN_RATIO) % 1)


def reduce_support(x: torch.Tensor, particle_ids: Sequence[int]) -> torch.Tensor:
    """Multiply each image's deviation from its channels' means by the half-plane window of its particle.

    Only one twin fits such a support (Fienup and Wackerman 1986, reduced-area support); different windows send
    different particles to different twins.
    """
    height, width = x.shape[-2:]
    windows = torch.stack([half_plane_window(height, width, window_angle(i)) for i in particle_ids])
    mean = x.mean((-2, -1), keepdim=True)
    return mean + windows[:, None].to(x) * (x - mean)


def aligned_mean(x: torch.Tensor, best: int, good: torch.Tensor) -> torch.Tensor:
    """Mean ``(C, H, W)`` of the particles ``good`` ``(P,)``, each flipped where that brings it nearer to the best."""
    chosen = x[good]
    flipped = rotate_180(chosen)
    nearer = (flipped - x[best]).flatten(1).norm(dim=1) < (chosen - x[best]).flatten(1).norm(dim=1)
    return torch.where(nearer[:, None, None, None], flipped, chosen).mean(0)
