"""What a chain's settings follow from: the largest curvature of its target, and how long it remembers."""

from __future__ import annotations

from collections.abc import Callable

import torch

from particledaps.diffusion.levels import per_particle

NEGLIGIBLE = 0.05
"""An autocorrelation below this is noise; the sum ends there."""


def largest_curvature(
    gradient: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, num_steps: int, generator: torch.Generator
) -> torch.Tensor:
    """Largest eigenvalue of the Hessian at each ``x`` ``(P, ...)``, ``(P,)``: power iteration on gradient differences.

    Args:
        gradient: of the potential, row by row.
        x: where.
        num_steps: gradients, beside the one at ``x``.
        generator: of the first direction, on the CPU.

    Example:
        >>> stiff = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
        >>> at = torch.zeros(1, 3, dtype=torch.float64)
        >>> round(largest_curvature(lambda x: stiff * x, at, 30, torch.Generator().manual_seed(0)).item(), 6)
        9.0
    """
    base = gradient(x)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    distance = 1e-2 * (1 + x.flatten(1).norm(dim=1))
    value = x.new_zeros(len(x))
    for _ in range(num_steps):
        norm = direction.flatten(1).norm(dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        unit = direction / per_particle(norm, x)
        direction = (gradient(x + per_particle(distance, x) * unit) - base) / per_particle(distance, x)
        value = direction.flatten(1).norm(dim=1)
    return value


def autocorrelation_time(path: torch.Tensor) -> float:
    r"""Integrated autocorrelation time of a stationary chain in steps, :math:`1 + 2 \sum_t \rho_t` (Sokal 1997).

    The coordinates count by their variance: what moves most is what an estimate's squared error is made of.

    Args:
        path: ``(T, ...)`` positions, step by step.

    Returns:
        At least 1 (independent steps); about T / 4 at most, where the chain is too short to tell.

    Example:
        >>> autocorrelation_time(torch.tensor([[1.0], [-1.0]] * 8))
        1.0
    """
    count = len(path)
    centred = (path - path.mean(0)).flatten(1)
    variance = centred.square().sum() / count
    total = 1.0
    for lag in range(1, count // 4):
        share = ((centred[lag:] * centred[:-lag]).sum() / (count - lag) / variance).item()
        if not share > NEGLIGIBLE:
            break
        total += 2 * share
    return total
