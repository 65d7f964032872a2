"""Latent diffusion (Rombach et al. 2022): CompVis conversions and diffusers' LDM folders, without text."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import nn

from particledaps.diffusion.denoiser import GuidedDenoiser
from particledaps.priors.autoencoder import Autoencoder, ResizedAutoencoder
from particledaps.priors.conditions import (
    check_card,
    check_channels,
    choose_class,
    null_class,
    refuse_conditions,
    square_side,
)
from particledaps.priors.diffusers_folder import CheckpointFolder, LoadOptions, load_network
from particledaps.priors.errors import PriorError
from particledaps.priors.latent_units import latent_autoencoder, positive
from particledaps.priors.pixel_unet import choose_image_class
from particledaps.priors.prior import Prior
from particledaps.priors.scheduler import build_denoiser
from particledaps.priors.unet import ConditionalUNet, ImageUNet, set_heads
from particledaps.priors.weight_files import load_table


def load_latent_diffusion(folder: CheckpointFolder, options: LoadOptions) -> Prior:
    """A latent prior, unconditional or conditioned on a class.

    Raises:
        PriorError: the folder is damaged, or an option does not fit it.
    """
    refuse_conditions(folder, options, "prompt")
    by_embedding = folder.class_embedding is not None
    unet = load_network(folder.unet, (UNet2DConditionModel if by_embedding else UNet2DModel,))
    if by_embedding:
        denoiser, class_id = _by_class_embedding(unet, folder, options)
    else:
        refuse_conditions(folder, options, "guidance_scale")
        set_heads(unet, folder)
        class_id = choose_image_class(unet, folder, options)
        denoiser = build_denoiser(ImageUNet(unet, class_id), folder, options.timestep_map)
    return latent_prior(folder, options, unet, denoiser, None if class_id is None else f"class {class_id}")


def _by_class_embedding(
    unet: UNet2DConditionModel, folder: CheckpointFolder, options: LoadOptions
) -> tuple[nn.Module, int]:
    weight = load_table(folder.class_embedding).get("weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] != unet.config.cross_attention_dim:
        raise PriorError(f"{folder.class_embedding} does not fit unet/config.json: weight (classes, context width)")
    class_id = choose_class(folder, len(weight), options.class_id)
    null = class_id if options.guidance_scale == 1 else null_class(folder, len(weight), options)
    context, free = (weight[i, None].float() for i in (class_id, null))
    return conditional_denoiser(unet, folder, options, context, free), class_id


def conditional_denoiser(
    unet: UNet2DConditionModel,
    folder: CheckpointFolder,
    options: LoadOptions,
    context: torch.Tensor,
    null_context: torch.Tensor,
) -> nn.Module:
    """A network that attends to ``context`` ``(L, D)``, guided away from ``null_context`` where that is asked for."""
    conditional, free = (
        build_denoiser(ConditionalUNet(unet, c), folder, options.timestep_map) for c in (context, null_context)
    )
    return conditional if options.guidance_scale == 1 else GuidedDenoiser(conditional, free, options.guidance_scale)


def latent_prior(
    folder: CheckpointFolder,
    options: LoadOptions,
    unet: UNet2DModel | UNet2DConditionModel,
    denoiser: nn.Module,
    condition: str | None,
) -> Prior:
    """Put the autoencoder of a folder beside its denoiser.

    Raises:
        PriorError: the autoencoder is damaged, or does not fit the U-Net or the card.
    """
    network = load_network(folder.autoencoder, (VQModel, AutoencoderKL))
    discrete = isinstance(network, VQModel)
    if discrete and network.config.lookup_from_codebook:
        raise PriorError(f"{folder.autoencoder}: its latents are code indices (lookup_from_codebook), not numbers")
    channels = (network.config.vq_embed_dim if discrete else None) or network.config.latent_channels
    check_channels(unet, channels, folder)
    latent_side = square_side(unet, folder)
    side = latent_side * 2 ** (len(network.config.block_out_channels) - 1)
    check_card(folder, side, options)
    native: Autoencoder = latent_autoencoder(network, folder, options)
    shown = options.image_size or side
    autoencoder = native if shown == side else ResizedAutoencoder(native, shown, side)
    unet.to(dtype=options.dtype)  # not the whole denoiser: conditions stay float32
    return Prior(
        name=folder.name,
        autoencoder=autoencoder,
        denoiser=denoiser.to(options.device),
        image_shape=(network.config.out_channels, shown, shown),
        latent_shape=(channels, latent_side, latent_side),
        latent_std=positive(folder.card.get("latent_std", 1.0), f"{folder.path / 'card.json'}: latent_std"),
        condition=condition,
    )
