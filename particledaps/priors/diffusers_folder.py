"""Folders in diffusers' layout: where they lie, their JSON files, and their networks, loaded strictly.

A folder holds one component a subfolder (``unet``, ``vae`` or ``vqvae``, ``scheduler``, ``text_encoder``, ...); old
pixel folders keep their only network and scheduler at the top. Nothing here opens a connection.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.utils import logging
from safetensors import SafetensorError
from torch import nn

from particledaps.priors.config_keys import check_network_config
from particledaps.priors.errors import PriorError
from particledaps.priors.trial import check_network
from particledaps.priors.weight_files import check_finite, disguise, find_weights

NETWORKS = {kind.__name__: kind for kind in (UNet2DModel, UNet2DConditionModel, AutoencoderKL, VQModel)}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ArithmeticError, SafetensorError)
CARD = "card.json"


@dataclass(frozen=True)
class LoadOptions:
    """How a checkpoint is turned into a prior.

    Attributes:
        device: where the networks go.
        dtype: type of their weights and arithmetic; latents, ODE and losses stay float32.
        timestep_map: ``native`` (the scheduler's own betas) or ``vp`` (the official DAPS code's map).
        ema: averaged weights are asked for.
        quantize_in_decode: quantise the latents of VQ autoencoders inside decode.
        class_id: class of a class-conditional network; None: its null class.
        prompt: of text-conditional networks.
        guidance_scale: weight of classifier-free guidance; 1 is off.
        negative_class_id: class to guide away from; None: the null class.
        negative_prompt: text to guide away from; None: the empty one.
        guidance_rescale: see :class:`particledaps.diffusion.guidance.GuidedDenoiser`.
        guidance_interval: sigmas at which to guide; None: all.
        latent_scale: factor between the autoencoder's latents and the denoiser's; None: the folder's.
        image_size: side of the images; None: the network's own.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    timestep_map: str = "native"
    ema: bool = True
    quantize_in_decode: bool = False
    class_id: int | None = None
    prompt: str = ""
    guidance_scale: float = 1.0
    negative_class_id: int | None = None
    negative_prompt: str | None = None
    guidance_rescale: float = 0.0
    guidance_interval: list[float] | None = None
    latent_scale: float | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder in diffusers' layout and the ``card.json`` that a conversion leaves in it.

    Attributes:
        name: for messages and records.
        path: the folder.
        card: facts of the conversion; empty for folders from elsewhere.
    """

    name: str
    path: Path
    card: dict[str, Any] = field(default_factory=dict)

    def component(self, *names: str) -> Path | None:
        """The subfolder of the first of these components that is there."""
        return next((self.path / name for name in names if (self.path / name).is_dir()), None)

    @property
    def unet(self) -> Path:
        """Folder of the U-Net; the top where there is no subfolder."""
        return self.component("unet") or self.path

    @property
    def autoencoder(self) -> Path | None:
        """Folder of the autoencoder; None for pixel networks."""
        return self.component("vae", "vqvae")

    @property
    def class_embedding(self) -> Path | None:
        """Table of class embeddings, or None."""
        path = self.path / "class_embedding.safetensors"
        return path if path.is_file() else None

    @property
    def unet_config(self) -> dict[str, Any]:
        """``config.json`` of the U-Net."""
        return read_json(self.unet / "config.json")

    @property
    def condition_kind(self) -> str | None:
        """What its network is told besides the noise level: ``class``, ``prompt`` or nothing (None)."""
        if self.family == "sd":
            return "prompt"
        config = self.unet_config
        by_number = config.get("num_class_embeds") is not None and config.get("class_embed_type") is None
        return "class" if self.class_embedding is not None or by_number else None

    @property
    def family(self) -> str:
        """``pixel``, ``ldm`` or ``sd`` (text-conditional): decided by what the folder holds."""
        if self.autoencoder is None:
            return "pixel"
        kind = self.unet_config.get("_class_name")
        return "sd" if kind == "UNet2DConditionModel" and self.class_embedding is None else "ldm"


def open_folder(path: str, root: Path) -> CheckpointFolder:
    """Find the folder that ``model.path`` names.

    Args:
        path: a folder (relative ones start at ``root``), or the id of a model in the hub's local cache.
        root: the checkout.

    Raises:
        PriorError: there is no such folder, or it is a file, or not a diffusers folder.
    """
    folder, name = root / path, Path(path).name
    if folder.is_file():
        raise PriorError(
            f"model.path={path} is a file, not a folder: convert the checkpoint once with "
            f"`python tools/convert_checkpoint.py {path} {Path(path).with_suffix('')}` and name the new folder"
        )
    if not folder.is_dir():
        folder, name = _cached(path), path
    if not (folder / "unet" / "config.json").is_file() and not (folder / "config.json").is_file():
        raise PriorError(f"model.path={path}: {folder} is no diffusers folder (unet/config.json is missing)")
    return CheckpointFolder(name, folder, read_json(folder / CARD) if (folder / CARD).is_file() else {})


def _cached(path: str) -> Path:
    if not HUB_ID.fullmatch(path):
        raise PriorError(
            f"model.path={path}: no such folder; fetch it (`bash download.sh` lists what there is) or convert a "
            "checkpoint (python tools/convert_checkpoint.py IN OUT)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        raise PriorError(
            f"model.path={path}: neither a folder nor a model in the hub's local cache; nothing is downloaded during "
            f"a run, so fetch it first: hf download {path}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        PriorError: the file is missing or holds something else.
    """
    if not path.is_file():
        raise PriorError(f"{path} is missing: fetch or convert the checkpoint again")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # ValueError: neither JSON nor UTF-8, or endless digits
        raise PriorError(f"{path} is damaged{disguise(path)}: {error}") from error
    if not isinstance(content, dict):
        raise PriorError(f"{path} is damaged: it holds no JSON object")
    return content


def load_network(folder: Path, allowed: tuple[type[nn.Module], ...]) -> nn.Module:
    """The network of a component, float32 on the CPU, evaluating and frozen; every weight must be used exactly once.

    Args:
        folder: with ``config.json`` and ``diffusion_pytorch_model.*`` (safetensors, or ``.bin`` opened without code; in
            half precision where only that variant is there).
        allowed: classes that fit here.

    Raises:
        PriorError: a file is missing, damaged, not finite, or does not fit the configuration; or the configuration
            asks for what is not given here.
    """
    config = read_json(folder / "config.json")
    kind = NETWORKS.get(str(config.get("_class_name")))
    if kind not in allowed:
        names = " or ".join(k.__name__ for k in allowed)
        raise PriorError(f"{folder / 'config.json'} describes a {config.get('_class_name')}; {names} is needed here")
    check_network_config(kind, config, folder / "config.json")
    found = find_weights(folder)
    logging.set_verbosity_error()
    check_network(kind, config, sum(file.stat().st_size for file in found.files), folder / "config.json")
    try:
        network, report = kind.from_pretrained(
            folder,
            variant=found.variant,
            use_safetensors=found.safetensors,
            local_files_only=True,
            output_loading_info=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
        )
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:240]
        raise PriorError(f"{folder}: its weights and config.json do not make a {kind.__name__}: {reason}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, report[what])):
            raise PriorError(
                f"{folder}: the weights do not fit config.json: {what.replace('_', ' ')} {', '.join(names[:3])}"
                f"{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            )
    check_finite(network.state_dict(), found.files[0] if len(found.files) == 1 else folder)
    return network.eval().requires_grad_(False)
