"""Stage two: a denoiser of standardised latents with EDM preconditioning and weighting."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import nn

from particledaps.data.training_views import TrainingImages, step_generator
from particledaps.diffusion.denoiser import EDMDenoiser
from particledaps.priors.autoencoder import KLAutoencoder
from particledaps.priors.embedded import UNetNetwork
from particledaps.training.loop import LoopSettings, TrainingLoop, plot_curve

VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.8, 1.2, 2.0, 5.0)


@dataclass
class DenoiserSettings:
    r"""Network, noise distribution and loss of stage two.

    The loss is EDM's: :math:`\lambda(\sigma) |D(z_0 + \sigma \epsilon; \sigma) - z_0|^2` with
    :math:`\lambda = (\sigma^2 + \sigma_d^2) / (\sigma \sigma_d)^2` and
    :math:`\ln \sigma \sim N(p_{mean}, p_{std}^2)` (Karras et al. 2022, table 1).

    Attributes:
        channels: width of each level, fine to coarse.
        layers: residual blocks a level.
        attention_levels: number of coarsest levels with self-attention.
        head_channels: channels of an attention head.
        norm_groups: groups of the group normalisation.
        noise_scale: see :class:`particledaps.diffusion.denoiser.EDMDenoiser`.
        sigma_data: standard deviation of the latents (they are standardised).
        log_sigma_mean: mean of ln sigma in training.
        log_sigma_std: standard deviation of ln sigma in training.
        bank_views: augmented views a training image that are encoded once and trained on.
        loop: optimisation.
    """

    channels: list[int] = field(default_factory=lambda: [64, 128, 128])
    layers: int = 1
    attention_levels: int = 2
    head_channels: int = 32
    norm_groups: int = 16
    noise_scale: float = 50.0
    sigma_data: float = 1.0
    log_sigma_mean: float = -0.4
    log_sigma_std: float = 1.3
    bank_views: int = 6
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(6_500, 48, 8e-4))


def build(settings: DenoiserSettings, latent_shape: tuple[int, int, int]) -> UNet2DModel:
    """The stage's network with fresh weights (seed the caller's global generator first)."""
    depth = len(settings.channels)
    attention = [level >= depth - settings.attention_levels for level in range(depth)]
    return UNet2DModel(
        sample_size=latent_shape[-1],
        in_channels=latent_shape[0],
        out_channels=latent_shape[0],
        layers_per_block=settings.layers,
        block_out_channels=tuple(settings.channels),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        norm_num_groups=settings.norm_groups,
        attention_head_dim=settings.head_channels,
    )


def wrap(unet: UNet2DModel, settings: DenoiserSettings) -> EDMDenoiser:
    """The denoiser of a trained or fresh network."""
    return EDMDenoiser(UNetNetwork(unet), settings.sigma_data, settings.noise_scale)


def latent_bank(
    autoencoder: KLAutoencoder, data: TrainingImages, views: int, seed: int, device: torch.device
) -> torch.Tensor:
    """Encode ``views`` augmented views of the training images once: ``(views * N, c, h, w)`` float32."""
    parts = []
    with torch.no_grad():
        for step in range(views * len(data.images) // 64 + 1):
            x = data.batch(64, step_generator(seed + 17, step)).to(device)
            parts.append(autoencoder.encode(x).float().cpu())
    return torch.cat(parts)


def edm_loss(
    denoiser: nn.Module, z0: torch.Tensor, sigma: torch.Tensor, noise: torch.Tensor, sigma_data: float
) -> torch.Tensor:
    """Weighted denoising loss per element, mean over the batch."""
    z = z0 + sigma.reshape(-1, 1, 1, 1) * noise
    weight = (sigma.square() + sigma_data**2) / (sigma * sigma_data).square()
    error = (denoiser(z, sigma) - z0).float().square().mean((1, 2, 3))
    return (weight * error).mean()


def denoising_errors(denoiser: nn.Module, z0: torch.Tensor, seed: int = 0) -> dict[str, float]:
    """Mean squared error of ``D`` at fixed sigmas with fixed noise, the validation of this stage."""
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(seed)).to(z0.device)
    errors = {}
    with torch.no_grad():
        for sigma in VALIDATION_SIGMAS:
            output = denoiser(z0 + sigma * noise, sigma)
            errors[f"validation_mse_sigma_{sigma}"] = (output - z0).square().mean().item()
    return errors


def train_denoiser(
    autoencoder: KLAutoencoder,
    settings: DenoiserSettings,
    data: TrainingImages,
    folder: Path,
    seed: int,
    device: torch.device,
) -> UNet2DModel:
    """Train the denoiser on encoded images; returns the EMA network."""
    bank = latent_bank(autoencoder, data, settings.bank_views, seed, device)
    with torch.no_grad():
        validation = autoencoder.encode(data.validation.to(device))
    unet = build(settings, tuple(bank.shape[1:])).to(device)
    loop = TrainingLoop(unet, copy.deepcopy(unet), settings.loop, folder)
    denoiser = wrap(unet, settings)

    def loss_function(step: int) -> dict[str, torch.Tensor]:
        generator, size = step_generator(seed, step), settings.loop.batch_size
        z0 = bank[torch.randint(len(bank), (size,), generator=generator)].to(device)
        noise = torch.randn(z0.shape, generator=generator).to(device)
        log_sigma = settings.log_sigma_mean + settings.log_sigma_std * torch.randn(size, generator=generator)
        sigma = log_sigma.exp().clamp(0.002, 80).to(device)
        return {"loss": edm_loss(denoiser, z0, sigma, noise, settings.sigma_data)}

    def validate(ema: nn.Module) -> dict[str, float]:
        return denoising_errors(wrap(ema, settings), validation)

    loop.run(loss_function, validate, device)
    plot_curve(folder)
    return loop.ema.eval()
