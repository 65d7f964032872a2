"""Draw images from a prior: from pure noise along a path of sigmas."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from particledaps.diffusion.solvers import Solver
from particledaps.files import write_atomically
from particledaps.particles.prior_draws import draw_latents
from particledaps.priors.fingerprint import prior_sha256
from particledaps.priors.prior import Prior
from particledaps.reports.pictures import contact_sheet, save_png
from particledaps.runs.calls import Calls
from particledaps.runs.progress import Steps, step_progress
from particledaps.settings.environment import device_facts, git_commit, versions


def draw(
    prior: Prior,
    count: int,
    seed: int,
    num_steps: int = 40,
    device: torch.device | str = "cpu",
    solver: Solver | None = None,
    path: str = "edm",
    batch_size: int = 64,
) -> torch.Tensor:
    """Samples ``(count, C, H, W)`` in [-1, 1]; sample ``i`` depends on ``seed`` and ``i`` only.

    Args:
        prior: what to draw from.
        count: how many.
        seed: of the noise, which comes from the CPU.
        num_steps: from noise to image.
        device: of the prior.
        solver: None: Heun, two network calls a step.
        path: see :func:`particledaps.particles.prior_draws.drawing_path`.
        batch_size: drawn at once; another one changes rounding.
    """
    sizes = [min(batch_size, count - first) for first in range(0, count, batch_size)]
    images: list[torch.Tensor] = []
    with _progress(count, prior.name, len(sizes)) as bar:
        for number, size in enumerate(sizes):
            z = draw_latents(prior, size, seed, num_steps, device, solver, path, number * batch_size)
            images.append(prior.decode(z).clamp(-1, 1).cpu())
            if bar is not None:
                bar.update(size)
    return torch.cat(images)


def _progress(count: int, name: str, batches: int) -> AbstractContextManager[Steps | None]:
    """Of a long drawing; nothing of one batch."""
    return nullcontext() if batches < 2 else closing(step_progress(count, 0, name, unit="image"))


def draw_samples(prior: Prior, path: Path, seed: int, count: int = 32) -> None:
    """A grid of samples as PNG."""
    grid(prior, draw(prior, count, seed), path, seed)


def grid(prior: Prior, images: torch.Tensor, path: Path, seed: int) -> None:
    """Images in rows of eight, as PNG."""
    tiles = [(image, str(i), False) for i, image in enumerate(images)]
    rows = [tiles[i : i + 8] for i in range(0, len(tiles), 8)]
    contact_sheet(path, rows, f"samples of {prior.name} (synthetic), seed {seed}")


def record_path(out: Path) -> Path:
    """Where the record of images at ``out`` goes: beside the grid, or the folder, under its name."""
    return out.with_suffix(".json") if out.suffix == ".png" else out.with_name(f"{out.name}.json")


def write_record(
    out: Path,
    settings: dict[str, Any],
    prior: Prior,
    path: list[float],
    calls: Calls,
    cpu_seconds: float,
    device: torch.device,
) -> None:
    """Settings, sigmas, calls, CPU seconds, weights and versions of images at ``out``, as JSON."""
    facts = {
        "settings": settings,
        "prior": {"name": prior.name, "condition": prior.condition, "sha256": prior_sha256(prior)},
        "sigmas": path,
        "calls": asdict(calls),
        "cpu_seconds": round(cpu_seconds, 2),
        "device": device_facts(device),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    write_atomically(record_path(out), json.dumps(facts, indent=1) + "\n")


def write(prior: Prior, images: torch.Tensor, out: Path, seed: int) -> None:
    """One grid if ``out`` ends in ``.png``, else a folder of single images."""
    single = out.suffix != ".png"
    (out if single else out.parent).mkdir(parents=True, exist_ok=True)
    if not single:
        grid(prior, images, out, seed)
        return
    for index, image in enumerate(images):
        save_png(out / f"{index:05d}.png", image)
