"""Latent diffusion (Rombach et al. 2022): CompVis conversions and diffusers' LDM folders, without text."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import nn

from particledaps.priors.autoencoder import Autoencoder, ResizedAutoencoder
from particledaps.priors.conditioning import Conditions
from particledaps.priors.diffusers_folder import CheckpointFolder, LoadOptions, load_network
from particledaps.priors.errors import PriorError
from particledaps.priors.folder_facts import check_card, check_channels, class_conditions, first_denoiser, square_side
from particledaps.priors.latent_units import latent_autoencoder, positive
from particledaps.priors.pixel_unet import image_denoiser
from particledaps.priors.prior import Prior
from particledaps.priors.unet import ConditionalUNet, set_heads
from particledaps.priors.weight_files import load_table


def load_latent_diffusion(folder: CheckpointFolder, options: LoadOptions) -> Prior:
    """A latent prior, unconditional or conditioned on a class.

    Raises:
        PriorError: the folder is damaged, or an option does not fit it.
    """
    by_embedding = folder.class_embedding is not None
    unet = load_network(folder.unet, (UNet2DConditionModel if by_embedding else UNet2DModel,))
    if by_embedding:
        weight = _class_embeddings(unet, folder)
        conditions = class_conditions(
            folder, options, len(weight), lambda index: ConditionalUNet(unet, weight[index, None].float())
        )
        denoiser = first_denoiser(conditions, folder, options)
    else:
        set_heads(unet, folder)
        denoiser, conditions = image_denoiser(unet, folder, options)
    return latent_prior(folder, options, unet, denoiser, conditions)


def _class_embeddings(unet: UNet2DConditionModel, folder: CheckpointFolder) -> torch.Tensor:
    """``(classes, width)``."""
    weight = load_table(folder.class_embedding).get("weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] != unet.config.cross_attention_dim:
        raise PriorError(f"{folder.class_embedding} does not fit unet/config.json: weight (classes, context width)")
    return weight


def latent_prior(
    folder: CheckpointFolder,
    options: LoadOptions,
    unet: UNet2DModel | UNet2DConditionModel,
    denoiser: nn.Module,
    conditions: Conditions | None,
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
        conditions=conditions,
    )
