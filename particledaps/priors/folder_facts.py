"""What the network of a checkpoint folder is told besides the noise level, and whether its parts fit each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from particledaps.diffusion.denoiser import Network
from particledaps.diffusion.score import Denoiser
from particledaps.priors.conditioning import Condition, Conditions, choose
from particledaps.priors.diffusers_folder import CheckpointFolder, LoadOptions
from particledaps.priors.errors import PriorError
from particledaps.priors.scheduler import build_denoiser


def null_class(folder: CheckpointFolder, count: int) -> int | None:
    """The class that says nothing: the card's ``null_class``; 1000 in a table of 1 001 classes; None: there is none.

    Raises:
        PriorError: the card names something else.
    """
    found = folder.card.get("null_class", 1000 if count == 1001 else None)
    if found is not None and type(found) is not int:
        raise PriorError(f"{folder.path / 'card.json'}: null_class={str(found)[:60]}: must be a class, or null")
    return found


def class_conditions(
    folder: CheckpointFolder, options: LoadOptions, count: int, network: Callable[[int], nn.Module]
) -> Conditions:
    """Conditions of a network that takes one of ``count`` classes.

    Args:
        folder: its scheduler and card.
        options: device and conventions.
        count: classes that it knows, the null class among them.
        network: ``network(class) -> module`` with shared weights.
    """

    def build(condition: Condition) -> nn.Module:
        return ready_denoiser(network(int(condition)), folder, options)

    return Conditions("class", build, null_class(folder, count), count)


def first_denoiser(conditions: Conditions, folder: CheckpointFolder, options: LoadOptions) -> Denoiser:
    """The denoiser that a class-conditional prior is loaded with: under the asked class, else the null class.

    Raises:
        PriorError: see :func:`particledaps.priors.conditioning.choose`.
    """
    return conditions.denoiser(choose(conditions, folder.name, options)[0], folder.name)


def ready_denoiser(network: Network, folder: CheckpointFolder, options: LoadOptions) -> nn.Module:
    """A network as a denoiser on the device of ``options``, for inference."""
    denoiser = build_denoiser(network, folder, options.timestep_map)
    return denoiser.to(options.device).eval().requires_grad_(False)


def check_channels(unet: nn.Module, channels: int, folder: CheckpointFolder) -> None:
    """The U-Net maps ``channels`` channels to as many, or to twice as many (a learned variance).

    Raises:
        PriorError: it does something else (inpainting, upscaling, or another autoencoder).
    """
    config: Any = unet.config
    if config.in_channels != channels or config.out_channels not in (channels, 2 * channels):
        raise PriorError(
            f"{folder.name}: its U-Net maps {config.in_channels} channels to {config.out_channels}, but {channels} to "
            f"{channels} are needed here (inpainting and upscaling networks do not fit)"
        )


def square_side(unet: nn.Module, folder: CheckpointFolder) -> int:
    """Side of what the U-Net was trained on, from ``sample_size``.

    Raises:
        PriorError: it is not told, or not square.
    """
    size = unet.config.sample_size
    sides = {size} if isinstance(size, int) else set(size or ())
    if len(sides) != 1:
        raise PriorError(f"{folder.unet / 'config.json'}: sample_size={size}: one side of square images is needed")
    return sides.pop()


def check_card(folder: CheckpointFolder, image_side: int, options: LoadOptions) -> None:
    """The card of a conversion agrees with the networks and with what is asked for.

    Raises:
        PriorError: another image size or range, or averaged weights where raw ones are asked for.
    """
    card, path = folder.card, folder.path / "card.json"
    if card.get("image_size", image_side) != image_side:
        raise PriorError(f"{path}: image_size={card['image_size']}, but the networks are made for {image_side} px")
    if card.get("image_range", [-1, 1]) != [-1, 1]:
        raise PriorError(f"{path}: image_range={card['image_range']}: only networks of images in [-1, 1] fit here")
    if card.get("ema") and not options.ema:
        raise PriorError(
            f"compat.ema=false asks for raw weights, but {folder.name} was converted with averaged ones (card.json, "
            "ema): convert the checkpoint again without them (python tools/convert_checkpoint.py --help) or set "
            "compat.ema=true"
        )
