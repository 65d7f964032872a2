"""Draw images from a prior: from pure noise along a path of sigmas."""

from __future__ import annotations

from pathlib import Path

import torch

from particledaps.diffusion.solvers import Solver
from particledaps.paths.schedules import edm_path
from particledaps.priors.prior import Prior
from particledaps.reports.pictures import contact_sheet, save_png
from particledaps.streams import stream

SIGMA_MAX, SIGMA_MIN = 40.0, 0.01


def largest_sigma(prior: Prior) -> float:
    """Where the ODE begins: the largest sigma that the network was trained at, where it says so, and at most 40."""
    parts = prior.denoiser.modules() if isinstance(prior.denoiser, torch.nn.Module) else [prior.denoiser]
    known = (getattr(getattr(part, "noise", None), "sigma_max", None) for part in parts)  # also within a guided one
    return min([SIGMA_MAX, *(sigma for sigma in known if sigma is not None)])


def draw(
    prior: Prior,
    count: int,
    seed: int,
    num_steps: int = 40,
    device: torch.device | str = "cpu",
    solver: Solver | None = None,
) -> torch.Tensor:
    """Samples ``(count, C, H, W)`` in [-1, 1]; sample ``i`` depends on ``seed`` and ``i`` only.

    Args:
        prior: what to draw from.
        count: how many.
        seed: of the noise, which comes from the CPU.
        num_steps: from noise to image.
        device: of the prior.
        solver: None: Heun, two network calls a step.
    """
    generators = [stream(seed, i, "generate") for i in range(count)]

    def normal() -> torch.Tensor:
        return torch.stack([torch.randn(prior.latent_shape, generator=g) for g in generators]).to(device)

    first, chosen = largest_sigma(prior), solver or Solver("heun")
    with torch.no_grad():
        path = edm_path(num_steps, first, SIGMA_MIN)
        z = chosen.solve(prior.denoiser, first * normal(), path, normal, prior.parts)
    return prior.decode(z).clamp(-1, 1).cpu()


def draw_samples(prior: Prior, path: Path, seed: int, count: int = 32) -> None:
    """A grid of samples as PNG."""
    grid(prior, draw(prior, count, seed), path, seed)


def grid(prior: Prior, images: torch.Tensor, path: Path, seed: int) -> None:
    """Images in rows of eight, as PNG."""
    tiles = [(image, str(i), False) for i, image in enumerate(images)]
    rows = [tiles[i : i + 8] for i in range(0, len(tiles), 8)]
    contact_sheet(path, rows, f"samples of {prior.name} (synthetic), seed {seed}")


def write(prior: Prior, images: torch.Tensor, out: Path, seed: int) -> None:
    """One grid if ``out`` ends in ``.png``, else a folder of single images."""
    single = out.suffix != ".png"
    (out if single else out.parent).mkdir(parents=True, exist_ok=True)
    if not single:
        grid(prior, images, out, seed)
        return
    for index, image in enumerate(images):
        save_png(out / f"{index:05d}.png", image)
