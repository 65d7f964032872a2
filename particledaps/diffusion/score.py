r"""What a denoiser ``D(z; sigma) = E[z0 | z0 + sigma * eps = z]`` says of latents.

``sigma`` is a scalar, ``(P,)`` (one level a particle) or ``(P, S)`` (a level of its own for each of S parts).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from particledaps.diffusion.levels import broadcast_sigma


class Denoiser(Protocol):
    """``denoiser(z, sigma) -> E[z0 | z]`` with ``z`` of shape ``(P, C, H, W)``."""

    def __call__(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor: ...


def score(
    denoiser: Denoiser, z: torch.Tensor, sigma: torch.Tensor | float, parts: Sequence[int] | None = None
) -> torch.Tensor:
    """``(D(z; sigma) - z) / sigma^2``; ``parts``: channels of each part, where sigma is ``(P, S)``."""
    return (denoiser(z, sigma) - z) / broadcast_sigma(sigma, z, parts).square()


def denoising_loss(denoiser: Denoiser, z: torch.Tensor, sigmas: Sequence[float], noise: torch.Tensor) -> torch.Tensor:
    r"""Denoising loss of clean latents, ``(P,)``; lower is more plausible.

    .. math:: \sum_\sigma \frac{1}{\sigma^2} |D(z + \sigma \epsilon_{\sigma i}; \sigma) - z|^2

    averaged over elements and draws i.

    Args:
        denoiser: of the latents.
        z: ``(P, C, H, W)``.
        sigmas: noise levels, S of them.
        noise: ``(P, S, n, C, H, W)``, n draws a level; the same for latents that are compared.
    """
    total = z.new_zeros(len(z))
    with torch.no_grad():
        for level, sigma in enumerate(sigmas):
            for draw in noise[:, level].unbind(1):
                error = denoiser(z + sigma * draw, sigma) - z
                total += error.square().flatten(1).mean(1) / (sigma**2 * noise.shape[2])
    return total
