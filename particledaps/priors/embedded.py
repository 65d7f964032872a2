"""Priors trained by ``train_prior.py``: a folder with ``config.json`` and two safetensors files.

``config.json`` holds the diffusers configurations of both networks, the latent statistics, the preconditioning and
the figures of the model card. Weights are stored as float16 and computed with as float32.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from particledaps.checkout import ROOT
from particledaps.diffusion.denoiser import EDMDenoiser
from particledaps.priors.autoencoder import KLAutoencoder
from particledaps.priors.embedded_checks import check_export, check_numbers, check_sides, is_patch, read_misfit_excess
from particledaps.priors.errors import PriorError
from particledaps.priors.prior import Prior
from particledaps.priors.trial import check_network
from particledaps.priors.weight_files import check_finite

CATS64 = ROOT / "assets" / "cats64"
"""The prior that this project ships."""
CONFIG = "config.json"
AUTOENCODER = "autoencoder.safetensors"
DENOISER = "denoiser.safetensors"
ENTRIES = {
    "name": str,
    "patch": int,
    "latent_mean": list,
    "latent_std": list,
    "sigma_data": int | float,
    "noise_scale": int | float,
    "autoencoder": dict,
    "denoiser": dict,
}


class UNetNetwork(nn.Module):
    """A ``UNet2DModel`` as ``network(input, c_noise) -> tensor``."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.unet(z, t).sample


def save_embedded(folder: Path, autoencoder: KLAutoencoder, denoiser: EDMDenoiser, facts: dict[str, Any]) -> None:
    """Write a prior as float16 safetensors and ``config.json``.

    Args:
        folder: created if absent.
        autoencoder: trained autoencoder with its latent statistics.
        denoiser: trained denoiser around a :class:`UNetNetwork`.
        facts: further entries of ``config.json`` (name, resolution, figures).

    Raises:
        PriorError: a weight or a statistic is not finite, or not within float16; nothing is written.
    """
    config = facts | {
        "patch": autoencoder.patch,
        "latent_mean": autoencoder.mean.flatten().tolist(),
        "latent_std": autoencoder.std.flatten().tolist(),
        "sigma_data": denoiser.sigma_data,
        "noise_scale": denoiser.noise_scale,
        "autoencoder": public_config(autoencoder.network),
        "denoiser": public_config(denoiser.network.unet),
    }
    halves = {AUTOENCODER: _half(autoencoder.network), DENOISER: _half(denoiser.network.unet)}
    check_export(config, halves)
    folder.mkdir(parents=True, exist_ok=True)
    for name, weights in halves.items():
        save_file(weights, folder / name)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n")


def load_embedded(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Prior:
    """Load a prior that :func:`save_embedded` wrote.

    Raises:
        PriorError: a file is missing, damaged, not finite, or does not fit the configuration.
    """
    config = read_config(folder)
    network, patch = _load_network(AutoencoderKL, config["autoencoder"], folder / AUTOENCODER), config["patch"]
    counts = {len(config["latent_mean"]), len(config["latent_std"]), network.config.latent_channels}
    check_numbers(config, folder / CONFIG)
    if not is_patch(patch, network) or len(counts) > 1:
        raise PriorError(f"{folder / CONFIG} is damaged: patch, latent_mean and latent_std do not fit the autoencoder")
    statistics = (torch.tensor(config[key]) for key in ("latent_mean", "latent_std"))
    autoencoder = KLAutoencoder(network, patch, *statistics)
    unet = _load_network(UNet2DModel, config["denoiser"], folder / DENOISER)
    check_sides(network, unet, folder / CONFIG)
    denoiser = EDMDenoiser(UNetNetwork(unet), float(config["sigma_data"]), float(config["noise_scale"]))
    for module in (autoencoder, denoiser):
        module.to(device, dtype).eval().requires_grad_(False)
    side, channels = network.config.sample_size * patch, network.config.in_channels // patch**2
    return Prior(
        name=config["name"],
        autoencoder=autoencoder,
        denoiser=denoiser,
        image_shape=(channels, side, side),
        latent_shape=(unet.config.in_channels, unet.config.sample_size, unet.config.sample_size),
        latent_std=float(config["sigma_data"]),
        misfit_excess=read_misfit_excess(config.get("misfit_excess"), folder / CONFIG),
    )


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
    wrong = [key for key, kind in ENTRIES.items() if not isinstance(entries.get(key), kind)]
    if wrong:
        raise PriorError(f"{path} is damaged: no valid entry {', '.join(wrong)}; export the prior again")
    return config


def public_config(network: nn.Module) -> dict[str, Any]:
    """A diffusers configuration without its private entries."""
    return {k: v for k, v in network.config.items() if not k.startswith("_")}


def _half(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.half().contiguous() for name, value in network.state_dict().items()}


def _load_network(kind: type[nn.Module], config: dict[str, Any], path: Path) -> nn.Module:
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
    try:
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except RuntimeError as error:
        lines = str(error).splitlines()
        first = lines[min(1, len(lines) - 1)].strip()[:160]  # the whole list can name hundreds of tensors
        raise PriorError(f"{path} does not fit {CONFIG}: {first} ...") from error
    check_finite(network.state_dict(), path)
    return network
