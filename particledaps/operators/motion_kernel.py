"""Random motion-blur kernels: a jittery walk of the camera, drawn as a thin line."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from particledaps.operators.interpolation import along_rows_and_columns, blurred, lanczos, shrinking_matrix

JITTER = 0.1


def draw_motion_kernel(size: int, intensity: float, generator: torch.Generator) -> torch.Tensor:
    """A kernel ``(size, size)``, float32, not negative, sum 1.

    The walk of :func:`draw_path` is drawn on a canvas of twice the size as a line of ``max(1, d / 150)`` px for a
    diagonal of d px, softened by a Gaussian of d / 100 px (both rounded down), reduced by two (Lanczos) and rounded to
    8 bits. (The recipe of LeviBorodenko/motionblur, which DAPS uses; the random numbers are other ones.)

    Args:
        size: side in pixels.
        intensity: 0 for straight motion, 1 for a walk that winds much.
        generator: CPU generator.
    """
    canvas = 2 * size
    diagonal = math.hypot(canvas, canvas)
    path = draw_path(diagonal, intensity, generator) + canvas / 2
    image = thicken(rasterise(path, canvas), max(1, int(diagonal / 150)))
    softness = int(0.01 * diagonal)
    if softness:
        image = blurred(image, softness)
    halve = shrinking_matrix(canvas, 2, lanczos, reach=3)
    grey = (255 * along_rows_and_columns(image, halve, halve)).round().clamp(0, 255)
    if not grey.any():  # a walk that left the canvas altogether
        grey[size // 2, size // 2] = 1
    return (grey / grey.sum()).float()


def draw_path(diagonal: float, intensity: float, generator: torch.Generator) -> torch.Tensor:
    r"""Points ``(n, 2)`` of a walk about the origin, float64.

    Length at least :math:`L = 0.75 d (U(0, 1) + U(0, I^2))` in steps below L of size
    :math:`(1.1 - I) d \, \mathrm{Beta}(1, 30)`; directions below :math:`\theta = U(0, I \pi)`, in absolute value
    triangular on :math:`[0, \theta + 0.1]` with mode :math:`I \theta`, whose sign flips with a probability drawn from
    Beta(2, 20); turned by U(0, pi).
    """

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    length = 0.75 * diagonal * (uniform().item() + intensity**2 * uniform().item())
    length = max(length, 1e-3 * diagonal)  # shorter walks stay in one pixel
    steps = torch.empty(0, dtype=torch.float64)
    while steps.sum() < length:
        smallest_of_30 = uniform(256, 30).amin(1)  # Beta(1, 30)
        candidates = (1 + JITTER - intensity) * diagonal * smallest_of_30
        steps = torch.cat([steps, candidates[candidates < length]])
    count = int((steps.cumsum(0) < length).sum()) + 1
    largest = intensity * math.pi * uniform().item()
    flips = uniform(count) < uniform(21).sort().values[1]  # Beta(2, 20)
    sizes = triangular(uniform(count), intensity * largest, largest + JITTER)
    first = (2 * uniform().item() - 1) * largest
    sizes[0], flips[0] = abs(first), first < 0
    angles = sizes * (1 - 2 * (flips.cumsum(0) % 2).double())
    angles = angles + math.pi * uniform().item()
    path = (steps[:count, None] * torch.stack([angles.cos(), angles.sin()], 1)).cumsum(0)
    return path - path.mean(0)


def triangular(u: torch.Tensor, mode: float, high: float) -> torch.Tensor:
    """Triangular distribution on ``[0, high]`` with mode ``mode``, from uniform numbers."""
    rising = (u * high * mode).sqrt()
    falling = high - ((1 - u) * high * (high - mode)).sqrt()
    return torch.where(u * high < mode, rising, falling)


def rasterise(path: torch.Tensor, size: int) -> torch.Tensor:
    """A line of 1 px through points ``(n, 2)`` of (column, row), ``(size, size)`` of 0 and 1; beyond it is cut off."""
    image = torch.zeros(size, size, dtype=torch.float64)
    corners = path.floor()
    points = [corners]
    for start, end in pairwise(corners):
        count = int((end - start).abs().amax())
        points.append(torch.lerp(start, end, torch.linspace(0, 1, count + 1, dtype=torch.float64)[:, None]))
    columns, rows = torch.cat(points).round().long().unbind(1)
    inside = (columns >= 0) & (columns < size) & (rows >= 0) & (rows < size)
    image[rows[inside], columns[inside]] = 1
    return image


def thicken(image: torch.Tensor, width: int) -> torch.Tensor:
    """Lines of 1 px in ``(H, W)`` made ``width`` px wide."""
    if width == 1:
        return image
    padded = torch.nn.functional.pad(image[None, None], ((width - 1) // 2, width // 2) * 2)
    return torch.nn.functional.max_pool2d(padded, width, stride=1)[0, 0]
