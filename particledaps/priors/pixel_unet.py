"""Pixel networks: guided-diffusion (ADM) conversions and diffusers' DDPM folders."""

from __future__ import annotations

from diffusers import UNet2DModel

from particledaps.priors.autoencoder import IdentityAutoencoder
from particledaps.priors.conditions import check_card, check_channels, choose_class, refuse_conditions, square_side
from particledaps.priors.diffusers_folder import CheckpointFolder, LoadOptions, load_network
from particledaps.priors.errors import PriorError
from particledaps.priors.prior import Prior
from particledaps.priors.scheduler import build_denoiser
from particledaps.priors.unet import ImageUNet, set_heads


def load_pixel_unet(folder: CheckpointFolder, options: LoadOptions) -> Prior:
    """A prior of images themselves: identity autoencoder, latents are pixels in [-1, 1].

    Raises:
        PriorError: the folder is damaged, or an option does not fit a pixel network.
    """
    refuse_conditions(folder, options, "prompt", "guidance_scale", "latent_scale")
    unet = set_heads(load_network(folder.unet, (UNet2DModel,)), folder)
    side, channels = square_side(unet, folder), unet.config.in_channels
    check_channels(unet, channels, folder)
    check_card(folder, side, options)
    if options.image_size not in (None, side):
        raise PriorError(f"model.image_size={options.image_size}: {folder.name} is a network of {side} px images")
    class_id = choose_image_class(unet, folder, options)
    network = ImageUNet(unet.to(options.device, options.dtype), class_id)
    shape = (channels, side, side)
    return Prior(
        name=folder.name,
        autoencoder=IdentityAutoencoder(),
        denoiser=build_denoiser(network, folder, options.timestep_map),
        image_shape=shape,
        latent_shape=shape,
        condition=None if class_id is None else f"class {class_id}",
    )


def choose_image_class(unet: UNet2DModel, folder: CheckpointFolder, options: LoadOptions) -> int | None:
    """The class of a ``UNet2DModel`` that has class embeddings; None for one that has not."""
    if unet.class_embedding is None:
        refuse_conditions(folder, options, "class_id")
        return None
    return choose_class(folder, unet.config.num_class_embeds, options.class_id)
