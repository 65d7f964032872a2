"""Clean latents drawn from a prior: from pure noise along a path of sigmas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from particledaps.diffusion.solvers import Solver
from particledaps.paths.schedules import edm_path
from particledaps.streams import stream

if TYPE_CHECKING:
    from particledaps.priors.prior import Prior

SIGMA_MAX, SIGMA_MIN = 40.0, 0.01


def largest_sigma(prior: Prior) -> float:
    """Where the ODE begins: the largest sigma that the network was trained at, where it says so, and at most 40."""
    parts = prior.denoiser.modules() if isinstance(prior.denoiser, torch.nn.Module) else [prior.denoiser]
    known = (getattr(getattr(part, "noise", None), "sigma_max", None) for part in parts)  # also within a guided one
    return min([SIGMA_MAX, *(sigma for sigma in known if sigma is not None)])


def draw_latents(
    prior: Prior,
    count: int,
    seed: int,
    num_steps: int,
    device: torch.device | str = "cpu",
    solver: Solver | None = None,
) -> torch.Tensor:
    """Clean latents ``(count, c, h, w)``; latent ``i`` depends on ``seed`` and ``i`` only.

    Args:
        prior: what to draw from.
        count: how many.
        seed: of the noise, which comes from the CPU.
        num_steps: from noise to latent.
        device: of the prior.
        solver: None: Heun, two network calls a step.
    """
    generators = [stream(seed, i, "generate") for i in range(count)]

    def normal() -> torch.Tensor:
        return torch.stack([torch.randn(prior.latent_shape, generator=g) for g in generators]).to(device)

    first, chosen = largest_sigma(prior), solver or Solver("heun")
    with torch.no_grad():
        path = edm_path(num_steps, first, SIGMA_MIN)
        return chosen.solve(prior.denoiser, first * normal(), path, normal, prior.parts)
