"""Pixel networks: guided-diffusion (ADM) conversions and diffusers' DDPM folders."""

from __future__ import annotations

from functools import partial

from diffusers import UNet2DModel
from torch import nn

from particledaps.priors.autoencoder import IdentityAutoencoder
from particledaps.priors.conditioning import Conditions
from particledaps.priors.diffusers_folder import CheckpointFolder, LoadOptions, load_network
from particledaps.priors.errors import PriorError
from particledaps.priors.folder_facts import (
    check_card,
    check_channels,
    class_conditions,
    first_denoiser,
    ready_denoiser,
    square_side,
)
from particledaps.priors.prior import Prior
from particledaps.priors.unet import ImageUNet, set_heads


def load_pixel_unet(folder: CheckpointFolder, options: LoadOptions) -> Prior:
    """A prior of images themselves: identity autoencoder, latents are pixels in [-1, 1].

    Raises:
        PriorError: the folder is damaged, or an option does not fit a pixel network.
    """
    if options.latent_scale is not None:
        raise PriorError(
            f"model.latent_scale={options.latent_scale!r}: {folder.name} is a pixel network without latents; leave it "
            "out"
        )
    unet = set_heads(load_network(folder.unet, (UNet2DModel,)), folder)
    side, channels = square_side(unet, folder), unet.config.in_channels
    check_channels(unet, channels, folder)
    check_card(folder, side, options)
    if options.image_size not in (None, side):
        raise PriorError(f"model.image_size={options.image_size}: {folder.name} is a network of {side} px images")
    unet.to(options.device, options.dtype)
    denoiser, conditions = image_denoiser(unet, folder, options)
    shape = (channels, side, side)
    return Prior(
        name=folder.name,
        autoencoder=IdentityAutoencoder(),
        denoiser=denoiser,
        image_shape=shape,
        latent_shape=shape,
        conditions=conditions,
    )


def image_denoiser(
    unet: UNet2DModel, folder: CheckpointFolder, options: LoadOptions
) -> tuple[nn.Module, Conditions | None]:
    """The denoiser of a ``UNet2DModel`` and, where it has class embeddings, what it can be told."""
    if unet.class_embedding is None:
        return ready_denoiser(ImageUNet(unet), folder, options), None
    conditions = class_conditions(folder, options, unet.config.num_class_embeds, partial(ImageUNet, unet))
    return first_denoiser(conditions, folder, options), conditions
