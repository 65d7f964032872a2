"""Stage last: write the prior's folder, with figures measured from the shipped float16 files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from particledaps.diffusion.targets import TrainedDenoiser
from particledaps.evaluation.metrics import psnr_db
from particledaps.evaluation.orientation import plausibility_loss
from particledaps.operators.operator import Operator
from particledaps.operators.phase_retrieval import PhaseRetrieval, rotate_180
from particledaps.priors.embedded import CONFIG, load_embedded, read_config, save_embedded
from particledaps.priors.prior import Prior
from particledaps.priors.transforms import Transform
from particledaps.runs.folder import finite
from particledaps.streams import measurement_generator
from particledaps.training.denoiser import denoising_errors


def export_prior(
    folder: Path,
    autoencoder: torch.nn.Module,
    denoiser: TrainedDenoiser,
    facts: dict[str, Any],
    validation: torch.Tensor,
) -> Prior:
    """Write the files, load them again, and add what they measure on the validation images."""
    save_embedded(folder, autoencoder, denoiser, facts)
    prior = load_embedded(folder)
    operator = PhaseRetrieval()
    config = read_config(folder)
    config["figures"] = {"validation": prior_figures(prior, validation)}
    config["misfit_excess"] = {operator.name: misfit_excess(prior, operator, validation[:32])}
    (folder / CONFIG).write_text(json.dumps(finite(config), indent=1, allow_nan=False) + "\n")
    return load_embedded(folder)


def prior_figures(prior: Prior, images: torch.Tensor) -> dict[str, Any]:
    """What a prior is worth on held-out images ``(N, C, H, W)``.

    Returns:
        Autoencoder PSNR (mean and standard error, dB; null where it is a transform, which loses nothing), share of
        images whose upright view the prior prefers to the 180-degree rotation, and the denoiser's mean squared error at
        several sigmas.
    """
    parts = images.split(25)
    exact = isinstance(prior.autoencoder, Transform)
    psnr = None if exact else torch.cat([psnr_db(prior.decode(prior.encode(x)), x) for x in parts])
    upright = torch.cat([plausibility_loss(prior, x) < plausibility_loss(prior, rotate_180(x)) for x in parts])
    errors = denoising_errors(prior.denoiser, torch.cat([prior.encode(x) for x in parts]))
    return {
        "num_images": len(images),
        "autoencoder_psnr_db": None if psnr is None else round(psnr.mean().item(), 3),
        "autoencoder_psnr_db_standard_error": None if psnr is None else standard_error(psnr),
        "orientation_upright_preferred": round(upright.float().mean().item(), 4),
        "denoising_mse": {k.rpartition("_")[2]: round(v, 5) for k, v in errors.items()},
    }


def standard_error(values: torch.Tensor) -> float | None:
    """Of the mean of ``values`` ``(N,)``; None for a single one."""
    return round((values.std() / len(values) ** 0.5).item(), 3) if len(values) > 1 else None


def misfit_excess(
    prior: Prior, operator: Operator, images: torch.Tensor, num_steps: int = 150
) -> tuple[float, float | None]:
    """Mean and standard deviation of ``L(D(z_fit)) - floor`` over images; of one image the spread is unknown, None.

    ``z_fit`` is the latent whose decoding is closest to the truth (Adam on the squared error from ``E(x)``): what is
    left of the loss is the decoder's, no sampler can remove it.
    """
    z = prior.encode(images)
    moment, square = torch.zeros_like(z), torch.zeros_like(z)
    for step in range(1, num_steps + 1):
        x, pullback = prior.decode_with_pullback(z)
        gradient = pullback(2 * (x - images))
        moment, square = 0.9 * moment + 0.1 * gradient, 0.99 * square + 0.01 * gradient.square()
        rate = 0.02 * (1 - step / (num_steps + 1))
        z = z - rate * (moment / (1 - 0.9**step)) / ((square / (1 - 0.99**step)).sqrt() + 1e-8)
    y = torch.cat([operator.measure(x[None], measurement_generator(0, i)) for i, x in enumerate(images)])
    excess = operator.loss(prior.decode(z), y) - operator.noise_floor(y).mean
    return round(excess.mean().item(), 2), round(excess.std().item(), 2) if len(excess) > 1 else None
