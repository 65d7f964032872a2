"""One noise level for all particles, one each, or one for each part of them."""

from __future__ import annotations

from typing import overload

import torch


def broadcast_sigma(sigma: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor:
    """Reshape a scalar, ``(P,)`` or ``(P, S)`` sigma so that it multiplies ``z`` of shape ``(P, C, ...)``.

    Raises:
        ValueError: the shape fits neither the particles nor equal groups of channels.
    """
    sigma = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
    trailing = (1,) * (z.ndim - 2)
    if sigma.ndim == 0:
        return sigma
    if sigma.ndim == 1 and len(sigma) in (1, len(z)):
        return sigma.reshape(-1, 1, *trailing)
    if sigma.ndim == 2 and len(sigma) in (1, len(z)) and z.shape[1] % sigma.shape[1] == 0:
        return sigma.repeat_interleave(z.shape[1] // sigma.shape[1], dim=1).reshape(len(sigma), -1, *trailing)
    raise ValueError(f"sigma of shape {tuple(sigma.shape)} does not fit z of shape {tuple(z.shape)}")


def network_sigma(sigma: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor:
    """Sigma as one value a particle, ``(P,)``, for a network's timestep embedding."""
    sigma = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
    if sigma.ndim > 1:
        raise ValueError("this network knows one noise level a particle, not (P, S)")
    return sigma.expand(len(z))


@overload
def per_particle(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor: ...
@overload
def per_particle(values: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float: ...
def per_particle(values: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float:
    """Reshape ``(P,)`` to ``(P, 1, ...)``; numbers pass."""
    if isinstance(values, torch.Tensor) and values.ndim == 1:
        return values.reshape(-1, *(1,) * (like.ndim - 1))
    return values
