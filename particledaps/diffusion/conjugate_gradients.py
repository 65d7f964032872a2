"""Linear systems of many particles at once, of which only products are known."""

from __future__ import annotations

from collections.abc import Callable

import torch

from particledaps.diffusion.levels import per_particle

TOLERANCE = 1e-5
"""Of the residual, as a share of the right-hand side."""


def conjugate_gradients(
    product: Callable[[torch.Tensor], torch.Tensor], right: torch.Tensor, num_steps: int, tolerance: float = TOLERANCE
) -> torch.Tensor:
    """``x`` with ``product(x) = right`` by conjugate gradients (Hestenes and Stiefel 1952), each particle on its own.

    Args:
        product: a symmetric positive definite matrix times ``(P, ...)``, row by row.
        right: ``(P, ...)``.
        num_steps: products at most.
        tolerance: a particle stops at this norm of its residual as a share of that of ``right``.
    """
    x = torch.zeros_like(right)
    residual = direction = right
    square = _inner(residual, residual)
    enough = tolerance**2 * square
    for _ in range(num_steps):
        going = square > enough
        if not bool(going.any()):
            break
        image = product(direction)
        step = torch.where(going, square / _inner(direction, image), 0)
        x = x + per_particle(step, x) * direction
        residual = residual - per_particle(step, x) * image
        before, square = square, _inner(residual, residual)
        ratio = torch.where(going, square / before, 0)
        direction = residual + per_particle(ratio, x) * direction
    return x


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).flatten(1).sum(1)
