"""Is what ``config.json`` of an embedded prior says, and what is to be exported, numbers that fit each other?"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel

from particledaps.priors.embedded_networks import UNetNetwork
from particledaps.priors.errors import PriorError
from particledaps.priors.transforms import TRANSFORMS, Transform
from particledaps.priors.trial import LARGEST_SIDE

LARGEST_NUMBER = 1e30
"""Beyond it float32 overflows."""


def check_export(config: dict[str, Any], halves: dict[str, dict[str, torch.Tensor]]) -> None:
    """A diverged training is no prior."""
    broken = [key for key in ("latent_mean", "latent_std") if not all(map(math.isfinite, config.get(key, [])))]
    for file, weights in halves.items():
        broken += [f"{Path(file).stem}.{name}" for name, value in weights.items() if not value.isfinite().all()]
    if broken:
        named = ", ".join(broken[:3]) + (", ..." if len(broken) > 3 else "")
        raise PriorError(
            f"nothing is exported: {named} is not finite in float16 (a diverged training): lower the learning rate of "
            "that stage, remove its folder and train it anew"
        )
    if flat := [channel for channel, std in enumerate(config.get("latent_std", [])) if std <= 0]:
        raise PriorError(f"nothing is exported: latent channel {flat[0]} is constant over the training images")


def check_numbers(config: dict[str, Any], path: Path) -> None:
    """Statistics and preconditioning are finite numbers; deviations and scales are positive."""
    for key, (allowed, kind) in NUMBERS.items():
        values = config.get(key, [])
        values = values if isinstance(values, list) else [values]
        if not all(type(v) in (int, float) and abs(v) < LARGEST_NUMBER and allowed(v) for v in values):
            raise PriorError(f"{path}: {key}={str(config[key])[:80]}: must be {kind}; export the prior again")


POSITIVE = (lambda value: value > 0), "finite and greater than 0"
NUMBERS: dict[str, tuple[Callable[[float], bool], str]] = {
    "latent_mean": ((lambda value: True), "finite"),
    "latent_std": POSITIVE,
    "sigma_data": POSITIVE,
    "noise_scale": POSITIVE,
    "sigma_min": ((lambda value: value >= 0), "finite and at least 0"),
}
"""Entries of ``config.json`` that are numbers, or lists of them: what they may be, and how that is said."""


def read_misfit_excess(entry: Any, path: Path) -> dict[str, tuple[float, float]]:
    """Mean and spread by operator; an unknown spread (null or NaN: of one image) is 0, an unknown mean no excess."""
    if entry is None:
        return {}
    pairs = entry.items() if isinstance(entry, dict) else [("", entry)]
    wrong = [pair for _, pair in pairs if not _is_pair(pair)]
    if wrong or not isinstance(entry, dict):
        found = str(wrong[0] if wrong else entry)[:80]
        raise PriorError(f"{path}: misfit_excess={found}: must be mean and spread by operator; export the prior again")
    return {name: (mean, spread if _is_known(spread) else 0.0) for name, (mean, spread) in pairs if _is_known(mean)}


def _is_known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _is_pair(pair: Any) -> bool:
    """Two numbers or nulls, the second at least 0."""
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    return all(v is None or type(v) in (int, float) for v in pair) and not (_is_known(pair[1]) and pair[1] < 0)


def is_patch(patch: int, network: AutoencoderKL) -> bool:
    """Blocks of so many pixels make up the channels of the network, in and out."""
    channels = {network.config.in_channels, network.config.out_channels}
    return type(patch) is int and 1 <= patch <= LARGEST_SIDE and len(channels) == 1 and not channels.pop() % patch**2


def read_transform(config: dict[str, Any], path: Path) -> Transform:
    """The transform that ``encoding`` names, where the other entries fit it.

    Raises:
        PriorError: they do not.
    """
    encoding, scale = config["encoding"], config["sigma_data"]
    if encoding not in TRANSFORMS:
        raise PriorError(f"{path}: encoding={encoding[:60]}: allowed are {', '.join(TRANSFORMS)}")
    transform = TRANSFORMS[encoding]()
    count = len(transform.parts(1))
    if isinstance(scale, list) and len(scale) != count:
        raise PriorError(f"{path}: sigma_data={str(scale)[:60]}: encoding={encoding} has {count} parts, one each")
    patch = config["patch"]
    if type(patch) is not int or not 1 <= patch <= LARGEST_SIDE:
        raise PriorError(f"{path}: patch={str(patch)[:60]}: must be a side of pixel blocks, at least 1")
    return transform


def transform_shapes(
    transform: Transform, network: UNetNetwork, path: Path
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes of latents and of images.

    Raises:
        PriorError: the channels of the network are no image's.
    """
    config, blocks = network.unet.config, network.patch**2
    unit = sum(transform.parts(1))
    side = config.sample_size if isinstance(config.sample_size, int) else 0
    if side < 1 or config.in_channels % (blocks * unit) or config.in_channels != config.out_channels:
        raise PriorError(f"{path} is damaged: sample_size or channels of the denoiser do not fit encoding and patch")
    shape = (config.in_channels // blocks, side * network.patch, side * network.patch)
    channels, *sides = transform.decode(torch.zeros(1, *shape)).shape[1:]
    return shape, (channels, *sides)


def check_sides(network: AutoencoderKL, unet: UNet2DModel, path: Path) -> None:
    """The autoencoder's latents are what the denoiser takes and returns."""
    sides = network.config.sample_size, unet.config.sample_size
    outer, inner = (side if isinstance(side, int) else 0 for side in sides)
    channels = {network.config.latent_channels, unet.config.in_channels, unet.config.out_channels}
    if not 0 < outer == inner * 2 ** (len(network.config.block_out_channels) - 1) or len(channels) > 1:
        raise PriorError(f"{path} is damaged: the sample_size or channels of autoencoder and denoiser do not fit")
