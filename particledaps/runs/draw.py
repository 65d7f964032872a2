"""Draw images from a prior: from pure noise along a path of sigmas."""

from __future__ import annotations

from pathlib import Path

import torch

from particledaps.diffusion.solvers import Solver
from particledaps.particles.prior_draws import draw_latents
from particledaps.priors.prior import Prior
from particledaps.reports.pictures import contact_sheet, save_png


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
    z = draw_latents(prior, count, seed, num_steps, device, solver)
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
