"""Stage one: a KL autoencoder."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from particledaps.data.training_views import TrainingImages, step_generator
from particledaps.evaluation.metrics import psnr_db
from particledaps.priors.autoencoder import build_kl_network
from particledaps.training.loop import LoopSettings, TrainingLoop, plot_curve


@dataclass
class AutoencoderSettings:
    """Network and loss of stage one.

    The loss is ``mse + gradient_weight * mse of finite differences + kl_weight * KL per latent element``.

    Attributes:
        channels: width of each level, fine to coarse; each level but the last halves the side.
        patch: side of the pixel blocks fed to the network.
        latent_channels: channels of the latent.
        layers: residual blocks a level (the decoder has one more).
        norm_groups: groups of the group normalisation.
        gradient_weight: weight of the finite-difference term.
        kl_weight: weight of the KL term.
        loop: optimisation.
    """

    channels: list[int] = field(default_factory=lambda: [48, 96])
    patch: int = 2
    latent_channels: int = 4
    layers: int = 1
    norm_groups: int = 8
    gradient_weight: float = 0.1
    kl_weight: float = 1e-5
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(10_000, 16, 1.5e-3))


def build(settings: AutoencoderSettings, resolution: int, image_channels: int = 3) -> AutoencoderKL:
    """The stage's network with fresh weights (seed the caller's global generator first)."""
    return build_kl_network(
        tuple(settings.channels),
        settings.patch,
        settings.latent_channels,
        resolution,
        settings.layers,
        settings.norm_groups,
        image_channels,
    )


def reconstruction_loss(output: torch.Tensor, target: torch.Tensor, gradient_weight: float) -> torch.Tensor:
    """Mean squared error of pixels plus ``gradient_weight`` times that of horizontal and vertical differences."""
    error = output - target
    rows, columns = error[..., 1:, :] - error[..., :-1, :], error[..., 1:] - error[..., :-1]
    return error.square().mean() + gradient_weight * (rows.square().mean() + columns.square().mean()) / 2


def reconstruct(network: AutoencoderKL, x: torch.Tensor, patch: int) -> torch.Tensor:
    """Decode the posterior mean of ``x``, without gradients."""
    with torch.no_grad():
        blocks = network.encode(torch.nn.functional.pixel_unshuffle(x, patch)).latent_dist.mean
        return torch.nn.functional.pixel_shuffle(network.decode(blocks).sample, patch)


def mean_psnr_db(network: nn.Module, images: torch.Tensor, patch: int) -> float:
    """Mean PSNR of the reconstructions, clipped to the range [-1, 1]."""
    outputs = torch.cat([reconstruct(network, part, patch) for part in images.split(50)])
    return psnr_db(outputs, images).mean().item()


def train_autoencoder(
    settings: AutoencoderSettings, data: TrainingImages, folder: Path, seed: int, device: torch.device
) -> AutoencoderKL:
    """Train encoder and decoder together; returns the EMA network."""
    network = build(settings, data.images.shape[-1], data.images.shape[1]).to(device)
    loop = TrainingLoop(network, copy.deepcopy(network), settings.loop, folder)
    validation = data.validation.to(device)

    def loss_function(step: int) -> dict[str, torch.Tensor]:
        generator = step_generator(seed, step)
        x = data.batch(settings.loop.batch_size, generator).to(device)
        posterior = network.encode(torch.nn.functional.pixel_unshuffle(x, settings.patch)).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        latents = posterior.mean + posterior.std * noise
        output = torch.nn.functional.pixel_shuffle(network.decode(latents).sample.float(), settings.patch)
        kl = posterior.kl().float().mean() / latents[0].numel()
        loss = reconstruction_loss(output, x, settings.gradient_weight) + settings.kl_weight * kl
        return {"loss": loss, "kl": kl, "mse": (output - x).square().mean()}

    def validate(ema: nn.Module) -> dict[str, float]:
        return {"validation_psnr_db": mean_psnr_db(ema, validation, settings.patch)}

    loop.run(loss_function, validate, device)
    plot_curve(folder)
    return loop.ema.eval()
