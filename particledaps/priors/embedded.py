"""Priors trained by ``train_prior.py``: a folder with ``config.json`` and one or two safetensors files.

``config.json`` holds the diffusers configurations of the networks, the latent statistics, the preconditioning and
the figures of the model card. Where ``encoding`` names a transform there is no trained autoencoder. Weights are stored
as float16 and computed with as float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from particledaps.checkout import ROOT
from particledaps.diffusion.denoiser import EDMDenoiser
from particledaps.diffusion.targets import TARGETS, TrainedDenoiser, denoiser_of, noise_map, target_of
from particledaps.priors.autoencoder import KLAutoencoder
from particledaps.priors.conditioning import Condition, Conditions
from particledaps.priors.embedded_checks import (
    check_export,
    check_numbers,
    check_sides,
    is_patch,
    read_misfit_excess,
    read_transform,
    transform_shapes,
)
from particledaps.priors.embedded_networks import UNetNetwork, around_unet
from particledaps.priors.errors import PriorError
from particledaps.priors.prior import Prior
from particledaps.priors.transforms import encoding_of, root_mean_square
from particledaps.priors.trial import check_network
from particledaps.priors.weight_files import check_finite

CATS64 = ROOT / "assets" / "cats64"
"""The prior that this project ships."""
CONFIG = "config.json"
AUTOENCODER = "autoencoder.safetensors"
DENOISER = "denoiser.safetensors"
COMMON = {"name": str, "patch": int, "sigma_data": int | float | list, "noise_scale": int | float, "denoiser": dict}
ENTRIES = {
    "autoencoder": COMMON | {"latent_mean": list, "latent_std": list, "autoencoder": dict},
    "transform": COMMON | {"encoding": str, "sigma_min": int | float},
}
"""Entries of ``config.json``, and their types, by how images become latents."""


def save_embedded(folder: Path, autoencoder: nn.Module, denoiser: TrainedDenoiser, facts: dict[str, Any]) -> None:
    """Write a prior as float16 safetensors and ``config.json``.

    Args:
        folder: created if absent.
        autoencoder: a trained one with its latent statistics, or one of
            :data:`particledaps.priors.transforms.TRANSFORMS`.
        denoiser: trained denoiser around a :class:`particledaps.priors.embedded_networks.UNetNetwork`.
        facts: further entries of ``config.json`` (name, resolution, figures).

    Raises:
        PriorError: a weight or a statistic is not finite, or not within float16; nothing is written.
    """
    config, halves = dict(facts), {DENOISER: _half(denoiser.network.weights())}
    if isinstance(autoencoder, KLAutoencoder):
        config |= {
            "patch": autoencoder.patch,
            "latent_mean": autoencoder.mean.flatten().tolist(),
            "latent_std": autoencoder.std.flatten().tolist(),
            "autoencoder": public_config(autoencoder.network),
        }
        halves = {AUTOENCODER: _half(autoencoder.network.state_dict())} | halves
    else:
        config |= {"encoding": encoding_of(autoencoder), "patch": denoiser.network.patch}
        config |= {"sigma_min": getattr(denoiser, "sigma_min", 0.0)}
    config |= preconditioning(denoiser) | {"denoiser": public_config(denoiser.network.unet)}
    check_export(config, halves)
    folder.mkdir(parents=True, exist_ok=True)
    for name, weights in halves.items():
        save_file(weights, folder / name)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def preconditioning(denoiser: TrainedDenoiser) -> dict[str, Any]:
    """Entries of ``config.json`` from which :func:`_denoiser` builds the same denoiser around its network."""
    if isinstance(denoiser, EDMDenoiser):
        return {"sigma_data": denoiser.sigma_data, "noise_scale": denoiser.noise_scale}
    target, terminal = target_of(denoiser)
    return {"target": target, "zero_terminal_snr": terminal}


def _denoiser(config: dict[str, Any], network: UNetNetwork, parts: tuple[int, ...] = ()) -> TrainedDenoiser:
    target, scale = config.get("target", "edm"), config["sigma_data"]
    noise = noise_map(target, config.get("zero_terminal_snr", False))
    scale = scale if isinstance(scale, list) else float(scale)
    return denoiser_of(
        target, network, noise, scale, float(config.get("noise_scale", 1)), parts, float(config.get("sigma_min", 0))
    )


def load_embedded(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Prior:
    """Load a prior that :func:`save_embedded` wrote.

    Raises:
        PriorError: a file is missing, damaged, not finite, or does not fit the configuration.
    """
    config = read_config(folder)
    prior = (_load_transformed if "encoding" in config else _load_latent)(config, folder)
    for module in (prior.autoencoder, prior.denoiser):
        module.to(device, dtype).eval().requires_grad_(False)
    return prior


def _load_latent(config: dict[str, Any], folder: Path) -> Prior:
    """A trained autoencoder and a denoiser of its latents."""
    network, patch = _load_network(AutoencoderKL, config["autoencoder"], folder / AUTOENCODER), config["patch"]
    counts = {len(config["latent_mean"]), len(config["latent_std"]), network.config.latent_channels}
    check_numbers(config, folder / CONFIG)
    if not is_patch(patch, network) or len(counts) > 1:
        raise PriorError(f"{folder / CONFIG} is damaged: patch, latent_mean and latent_std do not fit the autoencoder")
    statistics = (torch.tensor(config[key]) for key in ("latent_mean", "latent_std"))
    unet = _load_network(UNet2DModel, config["denoiser"], folder / DENOISER, UNetNetwork)
    check_sides(network, unet.unet, folder / CONFIG)
    denoiser = _denoiser(config, unet)
    side, channels = network.config.sample_size * patch, network.config.in_channels // patch**2
    return Prior(
        name=config["name"],
        autoencoder=KLAutoencoder(network, patch, *statistics),
        denoiser=denoiser,
        image_shape=(channels, side, side),
        latent_shape=(unet.unet.config.in_channels, unet.unet.config.sample_size, unet.unet.config.sample_size),
        latent_std=float(config["sigma_data"]),
        misfit_excess=read_misfit_excess(config.get("misfit_excess"), folder / CONFIG),
        **_class_conditions(denoiser, config),
    )


def _load_transformed(config: dict[str, Any], folder: Path) -> Prior:
    """A denoiser of pixels, or of parts that a transform makes of them."""
    path = folder / CONFIG
    check_numbers(config, path)
    transform = read_transform(config, path)
    around = partial(around_unet, patch=config["patch"], num_levels=len(transform.parts(1)))
    network = _load_network(UNet2DModel, config["denoiser"], folder / DENOISER, around)
    shape, image_shape = transform_shapes(transform, network, path)
    parts, scale = transform.parts(image_shape[0]), config["sigma_data"]
    denoiser = _denoiser(config, network, parts)
    return Prior(
        name=config["name"],
        autoencoder=transform,
        denoiser=denoiser,
        image_shape=image_shape,
        latent_shape=shape,
        latent_std=root_mean_square(scale, parts),
        misfit_excess=read_misfit_excess(config.get("misfit_excess"), path),
        parts=parts,
        redundant=transform.redundant,
        **_class_conditions(denoiser, config),
    )


def _class_conditions(denoiser: TrainedDenoiser, config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a prior whose network knows classes: the last of its table is the null class."""
    count = denoiser.network.num_classes
    if not count:
        return {}

    def build(condition: Condition) -> nn.Module:
        return denoiser.around(denoiser.network.conditioned(int(condition)))

    names = config.get("class_names") or []
    return {"conditions": Conditions("class", build, count, count + 1, tuple(map(str, names)))}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a prior's folder.

    Raises:
        PriorError: it is missing, damaged, or lacks an entry.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise PriorError(f"no prior in {folder}: {CONFIG} is missing (model.path names the folder of a trained prior)")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # ValueError: neither JSON nor UTF-8, or endless digits
        raise PriorError(f"{path} is damaged: {error}") from error
    entries = config if isinstance(config, dict) else {}
    needed = dict(ENTRIES["transform" if "encoding" in entries else "autoencoder"])
    if entries.get("target", "edm") != "edm":
        del needed["noise_scale"]
    wrong = [key for key, kind in needed.items() if not isinstance(entries.get(key), kind)]
    wrong += ["target"] if entries.get("target", "edm") not in TARGETS else []
    if wrong:
        raise PriorError(f"{path} is damaged: no valid entry {', '.join(wrong)}; export the prior again")
    return config


def public_config(network: nn.Module) -> dict[str, Any]:
    """A diffusers configuration without its private entries."""
    return {k: v for k, v in network.config.items() if not k.startswith("_")}


def _half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.half().contiguous() for name, value in weights.items()}


def _load_network(
    kind: type[nn.Module], config: dict[str, Any], path: Path, around: Callable[[Any], Any] | None = None
) -> Any:
    """A network, or what is built ``around`` it, with the weights at ``path``."""
    if not path.is_file():
        raise PriorError(f"{path} is missing: restore it (git checkout) or export the prior again")
    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise PriorError(f"{path} is not a readable safetensors file (truncated download?): {error}") from error
    check_network(kind, config, path.stat().st_size, path.parent / CONFIG)
    try:
        network = kind(**config)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise PriorError(f"{path.parent / CONFIG} describes no {kind.__name__}: {error}") from error
    network = network if around is None else around(network)
    load = network.load_state_dict if around is None else network.load_weights
    try:
        load({name: value.float() for name, value in weights.items()})
    except RuntimeError as error:
        lines = str(error).splitlines()
        first = lines[min(1, len(lines) - 1)].strip()[:160]  # the whole list can name hundreds of tensors
        raise PriorError(f"{path} does not fit {CONFIG}: {first} ...") from error
    check_finite(weights, path)
    return network
