"""One noise level for all particles, one each, or one for each part of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch


def broadcast_sigma(sigma: torch.Tensor | float, z: torch.Tensor, parts: Sequence[int] | None = None) -> torch.Tensor:
    """Reshape a scalar, ``(P,)`` or ``(P, S)`` sigma so that it multiplies ``z`` of shape ``(P, C, ...)``.

    Args:
        sigma: one level for all, one a particle, or one a particle and part (``(1, S)``: of all particles).
        z: what it multiplies.
        parts: channels of each of the S parts; None or empty: equal ones.

    Raises:
        ValueError: the shape fits neither the particles nor the parts.

    Example:
        >>> broadcast_sigma(torch.tensor([[1.0, 2.0]]), torch.zeros(5, 3, 8, 8), parts=(2, 1)).flatten().tolist()
        [1.0, 1.0, 2.0]
    """
    sigma = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
    trailing = (1,) * (z.ndim - 2)
    if sigma.ndim == 0:
        return sigma
    if sigma.ndim == 1 and len(sigma) in (1, len(z)):
        return sigma.reshape(-1, 1, *trailing)
    if sigma.ndim == 2 and len(sigma) in (1, len(z)):
        channels = _channels(sigma.shape[1], z.shape[1], parts)
        if channels is not None:
            columns = [column[:, None].expand(-1, n) for column, n in zip(sigma.unbind(1), channels, strict=True)]
            return torch.cat(columns, dim=1).reshape(len(sigma), -1, *trailing)
    asked = f" of parts {tuple(parts)}" if parts is not None and len(parts) > 1 else ""
    raise ValueError(f"sigma of shape {tuple(sigma.shape)} does not fit z of shape {tuple(z.shape)}{asked}")


def _channels(count: int, total: int, parts: Sequence[int] | None) -> list[int] | None:
    """Channels of each of ``count`` parts; None if they do not add up to ``total``."""
    if not parts or (len(parts) == 1 and count == 1):
        return [total // count] * count if total % count == 0 else None
    return list(parts) if len(parts) == count and sum(parts) == total else None


def spread(sigma: torch.Tensor | float, z: torch.Tensor, parts: Sequence[int] | None = None) -> torch.Tensor | float:
    """As :func:`broadcast_sigma`; a number stays one."""
    return broadcast_sigma(sigma, z, parts) if isinstance(sigma, torch.Tensor) else sigma


def network_sigma(sigma: torch.Tensor | float, z: torch.Tensor, num_levels: int = 1) -> torch.Tensor:
    """Sigma as a network's embedding takes it: ``(P,)``, or ``(P, S)`` for a network that knows S > 1 levels.

    Raises:
        ValueError: a level a part for a network that knows one level, or one of another number of parts.
    """
    sigma = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
    if num_levels == 1:
        if sigma.ndim > 1 and sigma.shape[1] > 1:
            raise ValueError("this network knows one noise level a particle, not (P, S)")
        return sigma.flatten().expand(len(z)) if sigma.ndim else sigma.expand(len(z))
    if sigma.ndim == 2 and sigma.shape[1] != num_levels:
        raise ValueError(f"this network knows {num_levels} noise levels, not {sigma.shape[1]}")
    return (sigma[:, None] if sigma.ndim == 1 else sigma).expand(len(z), num_levels)


def first_level(sigma: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor:
    """Sigma of the first part, ``(1,)`` or ``(P,)``: what a rule for one level goes by."""
    sigma = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
    return sigma[:, 0] if sigma.ndim == 2 else sigma.reshape(-1)


@overload
def per_particle(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor: ...
@overload
def per_particle(values: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float: ...
def per_particle(values: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float:
    """Reshape ``(P,)`` to ``(P, 1, ...)``; numbers pass."""
    if isinstance(values, torch.Tensor) and values.ndim == 1:
        return values.reshape(-1, *(1,) * (like.ndim - 1))
    return values
