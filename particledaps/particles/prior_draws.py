"""Clean latents drawn from a prior: from pure noise along a path of sigmas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from particledaps.diffusion.solvers import Solver
from particledaps.paths.schedules import AYS_SIGMAS, ays_path, cosine_path, edm_path, tan_path, trailing_timesteps
from particledaps.priors.errors import PriorError
from particledaps.streams import stream

if TYPE_CHECKING:
    from particledaps.priors.prior import Prior

SIGMA_MAX, SIGMA_MIN = 40.0, 0.01
TIMESTEPS = 1000


def noise_maps(prior: Prior) -> list[Any]:
    """Maps between sigma and timestep of a prior's networks, also within a guided one."""
    parts = prior.denoiser.modules() if isinstance(prior.denoiser, torch.nn.Module) else [prior.denoiser]
    return [noise for part in parts if (noise := getattr(part, "noise", None)) is not None]


def largest_sigma(prior: Prior) -> float:
    """Where the ODE begins: the largest sigma that the network was trained at, where it says so, and at most 40."""
    known = (getattr(noise, "sigma_max", None) for noise in noise_maps(prior))
    return min([SIGMA_MAX, *(sigma for sigma in known if sigma is not None)])


def drawing_path(prior: Prior, num_steps: int, name: str = "edm") -> torch.Tensor:
    """The path ``(num_steps + 1,)`` from pure noise to 0.

    Args:
        prior: says where to begin.
        num_steps: of the path.
        name: ``edm`` (rho 7), ``cosine``, ``tan`` (of the latents' standard deviation), ``trailing`` (equal strides of
            the network's timesteps from its last) or a table of Align Your Steps.

    Raises:
        PriorError: ``trailing``, and the network has no timesteps, or fewer of them.
    """
    first = largest_sigma(prior)
    if name == "trailing":
        maps = [noise for noise in noise_maps(prior) if hasattr(noise, "t_to_sigma")]
        if not maps or num_steps > TIMESTEPS:
            raise PriorError(
                f"path=trailing: {prior.name} has no timesteps (use path=edm)"
                if not maps
                else f"path=trailing: num_steps={num_steps} are more than the {TIMESTEPS} timesteps of {prior.name}"
            )
        sigmas = maps[0].t_to_sigma(trailing_timesteps(num_steps, TIMESTEPS))
        return torch.cat([sigmas, sigmas.new_zeros(1)])
    if name in AYS_SIGMAS:
        return ays_path(num_steps, first, SIGMA_MIN, name)
    if name == "tan":
        return tan_path(num_steps, first, SIGMA_MIN, prior.latent_std)
    return (cosine_path if name == "cosine" else edm_path)(num_steps, first, SIGMA_MIN)


def draw_latents(
    prior: Prior,
    count: int,
    seed: int,
    num_steps: int,
    device: torch.device | str = "cpu",
    solver: Solver | None = None,
    path: str = "edm",
    first: int = 0,
) -> torch.Tensor:
    """Clean latents ``(count, c, h, w)``; latent ``i`` depends on ``seed`` and ``i`` only.

    Args:
        prior: what to draw from.
        count: how many.
        seed: of the noise, which comes from the CPU.
        num_steps: from noise to latent.
        device: of the prior.
        solver: None: Heun, two network calls a step.
        path: see :func:`drawing_path`.
        first: index of the first one.
    """
    generators = [stream(seed, i, "generate") for i in range(first, first + count)]

    def normal() -> torch.Tensor:
        return torch.stack([torch.randn(prior.latent_shape, generator=g) for g in generators]).to(device)

    sigmas, chosen = drawing_path(prior, num_steps, path), solver or Solver("heun")
    with torch.no_grad():
        return chosen.solve(prior.denoiser, sigmas[0].item() * normal(), sigmas, normal, prior.parts)
