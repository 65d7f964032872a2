"""Stage two: a denoiser of latents, pixels or parts of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import UNet2DModel
from torch import nn

from particledaps.data.training_views import TrainingImages, step_generator
from particledaps.diffusion.targets import (
    SIGMA_RANGE,
    TrainedDenoiser,
    denoiser_of,
    denoising_loss,
    draw_levels,
    draw_noise,
    noise_map,
)
from particledaps.priors.autoencoder import Autoencoder
from particledaps.priors.embedded_networks import UNetNetwork, around_unet
from particledaps.training.loop import LoopSettings, TrainingLoop, plot_curve

VALIDATION_SIGMAS = (0.1, 0.3, 0.5, 0.8, 1.2, 2.0, 5.0)
BATCH = 256
"""Latents that are validated at once."""


@dataclass
class DenoiserSettings:
    r"""Network, noise distribution and loss of stage two.

    The loss of each target is in :mod:`particledaps.diffusion.targets`; with ``edm``
    :math:`\ln \sigma \sim N(p_{mean}, p_{std}^2)` (Karras et al. 2022, table 1). Each part of the latents has a sigma
    of its own, drawn independently; the loss is the sum of the parts' losses.

    Attributes:
        channels: width of each level, fine to coarse.
        patch: side of the pixel blocks that the network works on (space to depth); 1 for a trained autoencoder.
        layers: residual blocks a level.
        attention_levels: number of coarsest levels with self-attention.
        head_channels: channels of an attention head.
        norm_groups: groups of the group normalisation.
        noise_scale: see :class:`particledaps.diffusion.denoiser.EDMDenoiser`.
        target: what the network predicts: ``edm`` (EDM's preconditioned F), ``eps``, ``v``, ``x0`` or ``flow`` (the
            velocity of rectified flow).
        zero_terminal_snr: with ``v`` or ``x0``: let the cosine schedule end without any signal.
        min_snr_gamma: weigh each level by min(SNR, gamma) on the clean estimate; null: by the target's own error.
        noise_offset: standard deviation of a noise that all pixels of a channel share; with more than 0 the prior is no
            posterior mean under white noise, and the card says so.
        sigma_data: of ``edm``: root mean square of the latents; null: 1 for a trained autoencoder's (they are
            standardised), else measured, one a part.
        log_sigma_mean: mean of ln sigma in training.
        log_sigma_std: standard deviation of ln sigma in training.
        class_dropout: with classes: share of the samples that are shown the null class.
        bank_views: augmented views a training image that are encoded once and trained on.
        loop: optimisation.
    """

    channels: list[int] = field(default_factory=lambda: [64, 128, 128])
    patch: int = 1
    layers: int = 1
    attention_levels: int = 2
    head_channels: int = 32
    norm_groups: int = 16
    noise_scale: float = 50.0
    target: str = "edm"
    zero_terminal_snr: bool = False
    min_snr_gamma: float | None = None
    noise_offset: float = 0.0
    sigma_data: float | None = None
    log_sigma_mean: float = -0.4
    log_sigma_std: float = 1.3
    class_dropout: float = 0.1
    bank_views: int = 6
    loop: LoopSettings = field(default_factory=lambda: LoopSettings(6_500, 48, 8e-4))


@dataclass(frozen=True)
class LatentFacts:
    """What a denoiser is built for.

    Attributes:
        shape: ``(c, h, w)`` of the latents.
        parts: channels of each part that has noise of its own.
        sigma_data: root mean square of the latents; a number, or one a part.
        num_classes: classes without the null class; 0: none.
    """

    shape: tuple[int, int, int]
    parts: tuple[int, ...] = ()
    sigma_data: float | list[float] = 1.0
    num_classes: int = 0

    @property
    def num_levels(self) -> int:
        """Noise levels that the network is told."""
        return max(len(self.parts), 1)


def build(settings: DenoiserSettings, latents: LatentFacts) -> UNetNetwork:
    """The stage's network with fresh weights (seed the caller's global generator first)."""
    depth, blocks = len(settings.channels), settings.patch**2
    attention = [level >= depth - settings.attention_levels for level in range(depth)]
    unet = UNet2DModel(
        sample_size=latents.shape[-1] // settings.patch,
        in_channels=latents.shape[0] * blocks,
        out_channels=latents.shape[0] * blocks,
        layers_per_block=settings.layers,
        block_out_channels=tuple(settings.channels),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        norm_num_groups=settings.norm_groups,
        attention_head_dim=settings.head_channels,
        num_class_embeds=latents.num_classes + 1 if latents.num_classes else None,
        class_embed_type="identity" if latents.num_levels > 1 else None,
    )
    return around_unet(unet, settings.patch, latents.num_levels)


def wrap(network: UNetNetwork, settings: DenoiserSettings, latents: LatentFacts) -> TrainedDenoiser:
    """The denoiser of a trained or fresh network."""
    least = SIGMA_RANGE[0] if latents.num_levels > 1 else 0.0
    noise = noise_map(settings.target, settings.zero_terminal_snr)
    scale = settings.noise_scale
    return denoiser_of(settings.target, network, noise, latents.sigma_data, scale, latents.parts, least)


@dataclass(frozen=True)
class Bank:
    """Encoded views of the training images, on the device of the training.

    Attributes:
        latents: ``(N, c, h, w)`` float32.
        labels: ``(N,)`` classes, or None.
    """

    latents: torch.Tensor
    labels: torch.Tensor | None = None


def latent_bank(autoencoder: Autoencoder, data: TrainingImages, views: int, seed: int, device: torch.device) -> Bank:
    """Encode ``views`` augmented views of the training images once."""
    parts, labels = [], []
    with torch.no_grad():
        for step in range(views * len(data.images) // 64 + 1):
            x, own = data.labelled_batch(64, step_generator(seed + 17, step))
            parts.append(autoencoder.encode(x.to(device)).float())
            labels.append(own)
    return Bank(torch.cat(parts), torch.cat(labels).to(device) if data.labels is not None else None)


def latent_facts(bank: Bank, parts: tuple[int, ...], sigma_data: float | None, num_classes: int) -> LatentFacts:
    """What the denoiser of a bank's latents is built for; ``sigma_data`` None: the root mean square of each part."""
    scale: float | list[float] | None = sigma_data
    if scale is None:
        measured = [part.square().mean().sqrt().item() for part in bank.latents.split(list(parts), dim=1)]
        scale = measured if len(parts) > 1 else measured[0]
    return LatentFacts(tuple(bank.latents.shape[1:]), parts, scale, num_classes)


def denoising_errors(denoiser: nn.Module, z0: torch.Tensor, seed: int = 0) -> dict[str, float]:
    """Mean squared error of ``D`` at fixed sigmas (the same in all parts) with fixed noise: this stage's validation."""
    noise = torch.randn(z0.shape, generator=torch.Generator().manual_seed(seed)).to(z0.device)
    errors = {}
    with torch.no_grad():
        for sigma in VALIDATION_SIGMAS:
            output = torch.cat([denoiser(z, sigma) for z in (z0 + sigma * noise).split(BATCH)])
            errors[f"validation_mse_sigma_{sigma}"] = (output - z0).square().mean().item()
    return errors


def train_denoiser(
    autoencoder: Autoencoder,
    settings: DenoiserSettings,
    bank: Bank,
    latents: LatentFacts,
    validation: torch.Tensor,
    folder: Path,
    seed: int,
    device: torch.device,
) -> UNetNetwork:
    """Train the denoiser on encoded images; returns the EMA network.

    On a CPU step k depends on ``seed`` and k only; on CUDA noise is drawn there.
    """
    with torch.no_grad():
        held_out = autoencoder.encode(validation.to(device))
    network = build(settings, latents).to(device)
    if device.type == "cuda":
        network.to(memory_format=torch.channels_last)  # tensor cores take convolutions that way
    loop = TrainingLoop(network, copy.deepcopy(network), settings.loop, folder)
    levels = (latents.num_levels,) if latents.num_levels > 1 else ()
    plain = wrap(network, settings, latents)
    levels_of = noise_map(settings.target, settings.zero_terminal_snr)
    weighing = settings.target, settings.min_snr_gamma

    def loss_function(step: int) -> dict[str, torch.Tensor]:
        generator, size = step_generator(seed, step, device), settings.loop.batch_size
        drawn = {"generator": generator, "device": device}
        rows = torch.randint(len(bank.latents), (size,), **drawn)
        z0 = bank.latents[rows]
        noise = draw_noise(z0, settings.noise_offset, **drawn)
        log_normal = settings.log_sigma_mean, settings.log_sigma_std
        sigma = draw_levels(settings.target, (size, *levels), levels_of, log_normal, **drawn)
        denoiser = plain
        if bank.labels is not None:
            dropped = torch.rand(size, **drawn) < settings.class_dropout
            labels = torch.where(dropped, latents.num_classes, bank.labels[rows])
            denoiser = plain.around(network.conditioned(labels))
        loss = denoising_loss(denoiser, z0, sigma, noise, latents.sigma_data, latents.parts, *weighing)
        return {"loss": loss}

    def validate(ema: nn.Module) -> dict[str, float]:
        return denoising_errors(wrap(ema, settings, latents), held_out)

    loop.run(loss_function, validate, device)
    plot_curve(folder)
    return loop.ema.eval()
