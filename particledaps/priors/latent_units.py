"""Scale, shift and spread between an autoencoder's latents and its denoiser's: read from the folder, never guessed."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel

from particledaps.priors.autoencoder import LatentAutoencoder
from particledaps.priors.diffusers_folder import CheckpointFolder, LoadOptions, read_json
from particledaps.priors.errors import PriorError

LARGEST = 1e30
"""Beyond it float32 overflows."""
VQ_SCALE = 1.0
"""CompVis VQ autoencoders are used unscaled."""
VQ_CLASS_DEFAULT = 0.18215
"""What diffusers writes for every ``VQModel``; it belongs to Stable Diffusion's autoencoder."""


def latent_autoencoder(
    network: VQModel | AutoencoderKL, folder: CheckpointFolder, options: LoadOptions
) -> LatentAutoencoder:
    """An autoencoder with the latents that its denoiser was trained on, on the device and in the type asked for.

    A network that says ``force_upcast`` overflows in float16 and stays float32.

    Raises:
        PriorError: scale, shift or spread are no fitting numbers, or the scale is ambiguous.
    """
    scale = latent_scale(network, folder, options)
    mean, std = (None, None) if isinstance(network, VQModel) else latent_statistics(network, folder)
    native = LatentAutoencoder(network, scale, options.quantize_in_decode, mean, std).to(options.device)
    config = read_json(folder.autoencoder / "config.json")
    upcast = options.dtype == torch.float16 and config.get("force_upcast") is True  # the class default says so too
    network.to(dtype=torch.float32 if upcast else options.dtype)
    return native


def latent_scale(network: VQModel | AutoencoderKL, folder: CheckpointFolder, options: LoadOptions) -> float:
    """Factor of the latents: the option's, else the card's, else the configuration's (VQ: 1 where it says nothing).

    Raises:
        PriorError: it is no positive number, or a VQ configuration says what diffusers writes for any.
    """
    if options.latent_scale is not None:
        return positive(options.latent_scale, "model.latent_scale")
    if "latent_scale" in folder.card:
        return positive(folder.card["latent_scale"], f"{folder.path / 'card.json'}: latent_scale")
    path = folder.autoencoder / "config.json"
    if not isinstance(network, VQModel):
        return positive(network.config.scaling_factor, f"{path}: scaling_factor")
    stated = read_json(path).get("scaling_factor")
    if stated == VQ_CLASS_DEFAULT:
        raise PriorError(
            f"{path}: scaling_factor={stated} is what diffusers writes for every VQModel, and it may or may not be"
            f" meant: set model.latent_scale=1 (networks of latent diffusion) or model.latent_scale={stated}"
        )
    return VQ_SCALE if stated is None else positive(stated, f"{path}: scaling_factor")


def latent_statistics(
    network: AutoencoderKL, folder: CheckpointFolder
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``latents_mean + shift_factor`` and ``latents_std``, ``(c,)`` each; None where nothing is said.

    Raises:
        PriorError: they are no finite numbers, one a channel, the spread positive.
    """
    path, config = folder.autoencoder / "config.json", network.config
    mean, std = (_per_channel(config, key, path) for key in ("latents_mean", "latents_std"))
    if std is not None and not (std > 0).all():
        raise PriorError(f"{path}: latents_std={config.latents_std}: all must be greater than 0")
    shift = config.shift_factor
    if shift is None or shift == 0:
        return mean, std
    if not _is_finite(shift):
        raise PriorError(f"{path}: shift_factor={shift} is no finite number")
    return (torch.zeros(config.latent_channels) if mean is None else mean) + shift, std


def positive(value: Any, name: str) -> float:
    """``value`` as a finite number greater than 0.

    Raises:
        PriorError: it is none.
    """
    if not _is_finite(value) or value <= 0:
        raise PriorError(f"{name}={value}: must be greater than 0")
    return float(value)


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _per_channel(config: Any, key: str, path: Any) -> torch.Tensor | None:
    values, count = config[key], config.latent_channels
    if values is None:
        return None
    fitting = isinstance(values, list | tuple) and len(values) == count and all(map(_is_finite, values))
    if not fitting:
        raise PriorError(f"{path}: {key}={str(values)[:80]}: must be {count} finite numbers, one a latent channel")
    return torch.tensor(values, dtype=torch.float32)
