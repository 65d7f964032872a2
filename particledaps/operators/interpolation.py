"""Matrices of one-dimensional linear maps of pixel rows: resampling and blurring, boundaries included."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

Kernel = Callable[["torch.Tensor"], "torch.Tensor"]


def cubic(t: torch.Tensor) -> torch.Tensor:
    r"""Keys's cubic convolution kernel (1981) with :math:`a = -1/2`, zero beyond 2."""
    t = t.abs()
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def lanczos(t: torch.Tensor) -> torch.Tensor:
    r""":math:`\mathrm{sinc}(t) \, \mathrm{sinc}(t / 3)`, zero beyond 3."""
    return torch.where(t.abs() < 3, torch.sinc(t) * torch.sinc(t / 3), torch.zeros_like(t))


def mirrored(index: torch.Tensor, size: int) -> torch.Tensor:
    """Indices on ``... 1 0 | 0 1 ... size - 1 | size - 1 ...``: reflection that repeats the edge pixel."""
    index = index % (2 * size)
    return torch.minimum(index, 2 * size - 1 - index)


def reflected(index: torch.Tensor, size: int) -> torch.Tensor:
    """Indices on ``... 2 1 | 0 1 ... size - 1 | size - 2 ...``: reflection about the edge pixel."""
    if size == 1:
        return torch.zeros_like(index)
    index = index % (2 * size - 2)
    return torch.minimum(index, 2 * size - 2 - index)


def shrinking_matrix(size: int, scale_factor: int, kernel: Kernel, reach: int) -> torch.Tensor:
    r"""Antialiased resampling of ``size`` pixels to ``ceil(size / scale_factor)``, ``(out, size)`` in float64.

    Output ``i`` is centred at :math:`u = s (i + 1/2) - 1/2`; the kernel is stretched by ``s``, its weights sum to 1,
    the boundary mirrors the edge pixel too (MATLAB's ``imresize``).

    Args:
        size: pixels of the input row.
        scale_factor: s.
        kernel: interpolation kernel.
        reach: the kernel is zero beyond it.
    """
    centre = scale_factor * (torch.arange(math.ceil(size / scale_factor), dtype=torch.float64) + 0.5) - 0.5
    first = torch.floor(centre - reach * scale_factor)
    taps = first[:, None] + torch.arange(2 * reach * scale_factor + 2, dtype=torch.float64)
    weights = kernel((centre[:, None] - taps) / scale_factor)
    weights = weights / weights.sum(1, keepdim=True)
    matrix = torch.zeros(len(centre), size, dtype=torch.float64)
    return matrix.scatter_add_(1, mirrored(taps.long(), size), weights)


def filtering_matrix(size: int, weights: torch.Tensor) -> torch.Tensor:
    """Correlation of ``size`` pixels with odd-sized ``weights``, reflected about the edge pixels, ``(size, size)``."""
    radius = len(weights) // 2
    taps = torch.arange(size)[:, None] + torch.arange(-radius, radius + 1)
    matrix = torch.zeros(size, size, dtype=weights.dtype)
    return matrix.scatter_add_(1, reflected(taps, size), weights.expand(size, -1))


def gaussian_weights(std: float, radius: int) -> torch.Tensor:
    """Sampled Gaussian of standard deviation ``std`` on ``2 * radius + 1`` pixels, sum 1, float64."""
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    return torch.softmax(-0.5 * (x / std).square(), 0)


def along_rows_and_columns(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """``R x C^T`` on every channel of ``(..., H, W)``."""
    return rows @ x @ columns.mT


def blurred(image: torch.Tensor, std: float) -> torch.Tensor:
    """Gaussian blur of ``(H, W)``, truncated at 4 standard deviations, zeros outside."""
    radius = int(4 * std + 0.5)
    weights = gaussian_weights(std, radius).to(image)
    kernel = torch.outer(weights, weights)[None, None]
    return torch.nn.functional.conv2d(image[None, None], kernel, padding=radius)[0, 0]
