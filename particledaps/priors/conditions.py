"""What a network is told besides the noise level, and checks of the options that say so."""

from __future__ import annotations

from typing import Any

from torch import nn

from particledaps.priors.diffusers_folder import CheckpointFolder, LoadOptions
from particledaps.priors.errors import PriorError

REFUSALS = {
    "prompt": "holds no network that takes a text",
    "class_id": "holds no network that takes a class",
    "guidance_scale": "holds an unconditional network, which cannot be guided",
    "latent_scale": "is a pixel network without latents",
}


def choose_class(folder: CheckpointFolder, count: int, class_id: int | None) -> int:
    """The class to condition on: the asked one, else the null class of the card.

    Args:
        folder: its card may name a ``null_class``; a table of 1 001 classes has 1000 as null class.
        count: classes that the network knows.
        class_id: ``model.class_id``.

    Raises:
        PriorError: the class is out of range, or none is given and there is no null class.
    """
    chosen = _null(folder, count) if class_id is None else class_id
    if chosen is None:
        raise PriorError(f"model.class_id is not set: {folder.name} knows no null class; choose 0 to {count - 1}")
    if type(chosen) is not int:
        raise PriorError(f"{folder.path / 'card.json'}: null_class={str(chosen)[:60]}: must be a class, or null")
    if not 0 <= chosen < count:
        raise PriorError(f"model.class_id={chosen}: {folder.name} knows the classes 0 to {count - 1}")
    return chosen


def _null(folder: CheckpointFolder, count: int) -> int | None:
    return folder.card.get("null_class", 1000 if count == 1001 else None)


def null_class(folder: CheckpointFolder, count: int, options: LoadOptions) -> int:
    """The class that guidance leads away from.

    Raises:
        PriorError: there is none.
    """
    if _null(folder, count) is None:
        raise PriorError(
            f"model.guidance_scale={options.guidance_scale:g}: {folder.name} knows no null class to guide away from;"
            " leave it out"
        )
    return choose_class(folder, count, None)


def refuse_conditions(folder: CheckpointFolder, options: LoadOptions, *names: str) -> None:
    """Options that this network does not know must keep their defaults.

    Raises:
        PriorError: one of ``names`` is set.
    """
    defaults = LoadOptions()
    for name in names:
        value = getattr(options, name)
        if value != getattr(defaults, name):
            raise PriorError(f"model.{name}={value!r}: {folder.name} {REFUSALS[name]}; leave it out")


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
