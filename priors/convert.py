"""Checkpoints of latent diffusion and guided diffusion -> a folder in diffusers' layout, with a card.

Networks are diffusers' own classes; a conversion is a renaming (priors/conversion/), so outputs stay the same.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors import SafetensorError
from safetensors.torch import save_file

from priors.conversion.checkpoint import read_state_dict, sha256
from priors.conversion.families import FAMILIES, noise_schedule, read_options, recognise
from priors.conversion.mapping import State, shapes_of
from priors.conversion.parts import Contents, Part, read_latent, read_pixel
from priors.prior import PriorError

CARD, UNET, VAE, SCHEDULER, CLASSES = "card.json", "unet", "vae", "scheduler", "class_embedding.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
IDENTITY = ("family", "source_sha256", "ema", "architecture")


@dataclass(frozen=True)
class Card:
    """What a converted folder holds and where it comes from.

    Attributes:
        family: a name of ``FAMILIES``.
        source_file: name of the checkpoint.
        source_sha256: of the checkpoint.
        ema: the U-Net's weights are those under ``model_ema`` (guided diffusion publishes only one set: false).
        architecture: what was said beyond the family's values.
        source_keys: keys in the checkpoint: used and dropped.
        used_keys: keys that were read.
        dropped: prefix -> number of keys left out.
        reasons: prefix -> why they were.
        dropped_rows: key -> ``[first, end)`` of the output channels left out (learned variance).
        parameters: network -> number of parameters.
        image_range: of the images that the networks see.
        image_size: side in pixels.
        latent_scale: latents of the U-Net = this times those of the first stage.
        num_classes: rows of the class embedding, or None.
        null_class: the class that means "none" (the last of latent diffusion's 1001), or None.
        learned_sigma: the original predicts a variance, which is dropped.
    """

    family: str
    source_file: str
    source_sha256: str
    ema: bool
    architecture: dict[str, Any]
    source_keys: int
    used_keys: int
    dropped: dict[str, int]
    reasons: dict[str, str]
    dropped_rows: dict[str, list[int]]
    parameters: dict[str, int]
    image_range: list[int]
    image_size: int
    latent_scale: float
    num_classes: int | None
    null_class: int | None
    learned_sigma: bool


def convert_checkpoint(
    source: Path,
    target: Path,
    family: str | None = None,
    ema: bool = True,
    architecture: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Card:
    """Write the networks of a checkpoint as safetensors in diffusers' layout.

    Every key of the file is used once or dropped for a stated reason. The folder appears whole or not at all.

    Args:
        source: PyTorch checkpoint or safetensors of a family in ``FAMILIES``.
        target: folder to create; one that holds the same conversion is left as it is.
        family: None: recognised from keys and shapes.
        ema: use averaged weights where a family has them.
        architecture: what shapes do not tell, where it differs from the published model: ``image_size``,
            ``num_head_channels`` or ``num_heads``, ``attention_order`` (``legacy`` or ``new``).
        report: called with a line before each long step.

    Returns:
        The card, also written as ``card.json``.

    Raises:
        PriorError: the file cannot be read safely, is of no known family, or keys are missing, unexpected, misshapen
            or not finite; or ``target`` exists and holds something else.
    """
    source, target = Path(source), Path(target)
    if os.path.lexists(target):
        _existing_card(target)
    report(f"opening {source}")
    state = read_state_dict(source)
    try:
        name = recognise(shapes_of(state), family)
        contents, size = _read(state, name, ema, architecture)
        schedule = noise_schedule(FAMILIES[name], contents.betas)
    except PriorError as error:
        raise PriorError(f"{source}: {error}") from error
    report(f"{name}: {len(state)} keys fit; reading the file's SHA-256")
    card = _card(source, name, contents, len(state), dict(architecture or {}), size)
    if os.path.lexists(target):
        return _existing(target, card)
    try:
        _write(target, contents, schedule, card, report)
    except PriorError as error:
        raise PriorError(f"{source}: {error}") from error
    return card


def read_card(folder: Path) -> Card:
    """The card of a converted folder.

    Raises:
        PriorError: there is none, or it is damaged.
    """
    path = folder / CARD
    try:
        return Card(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise PriorError(f"{path} is no card of a converted checkpoint: {error}") from error


def _read(state: State, name: str, ema: bool, architecture: Mapping[str, Any] | None) -> tuple[Contents, int]:
    family = FAMILIES[name]
    options = read_options(family, architecture)
    contents = read_latent(state, family, options, ema) if family.latent else read_pixel(state, options)
    return contents, options.image_size


def _card(source: Path, family: str, contents: Contents, keys: int, architecture: dict[str, Any], size: int) -> Card:
    parts = {UNET: contents.unet} | ({VAE: contents.vae} if contents.vae else {})
    classes = contents.architecture.classes if contents.classes is None else len(contents.classes)
    return Card(
        family=family,
        source_file=source.name,
        source_sha256=sha256(source),
        ema=contents.ema,
        architecture=architecture,
        source_keys=keys,
        used_keys=contents.used,
        dropped=contents.dropped,
        reasons=contents.reasons,
        dropped_rows={key: list(rows) for key, rows in contents.dropped_rows.items()},
        parameters={name: part.parameters for name, part in parts.items()},
        image_range=[-1, 1],
        image_size=size,
        latent_scale=contents.latent_scale,
        num_classes=classes,
        null_class=None if contents.classes is None else classes - 1,
        learned_sigma=contents.architecture.learned_sigma,
    )


def _existing_card(target: Path) -> Card:
    if not (target / CARD).is_file():
        raise PriorError(f"{target} exists and is no converted checkpoint: choose another folder or remove it")
    return read_card(target)


def _existing(target: Path, card: Card) -> Card:
    """The card of ``target`` if it is the same conversion."""
    found = _existing_card(target)
    different = [key for key in IDENTITY if getattr(found, key) != getattr(card, key)]
    if different:
        values = ", ".join(f"{key}={getattr(found, key)}" for key in different)
        raise PriorError(f"{target} holds another conversion ({values}): choose another folder or remove it")
    parts = [name for name in found.parameters if not (target / name / WEIGHTS).is_file()]
    if parts:
        raise PriorError(f"{target} is incomplete ({parts[0]}/{WEIGHTS} is missing): remove it and convert again")
    return found


def _write(
    target: Path, contents: Contents, schedule: dict[str, Any], card: Card, report: Callable[[str], None]
) -> None:
    """Fill a folder beside ``target``, then rename it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name in card.parameters:
            report(f"writing {name}: {card.parameters[name]:,} parameters")
            _write_network(folder / name, contents.unet if name == UNET else contents.vae)
        if contents.classes is not None:
            save_file(
                {"weight": _finite({"the class embedding": contents.classes.float()}).popitem()[1]}, folder / CLASSES
            )
        scheduler = DDIMScheduler(**schedule, clip_sample=False, set_alpha_to_one=False, prediction_type="epsilon")
        scheduler.save_pretrained(folder / SCHEDULER)
        (folder / CARD).write_text(json.dumps(asdict(card), indent=1) + "\n")
        folder.chmod(0o755)
        folder.rename(target)
    except (OSError, SafetensorError) as error:
        raise PriorError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # after a rename there is none


def _write_network(folder: Path, part: Part) -> None:
    part.network.save_config(folder)
    save_file(_finite(part.weights()), folder / WEIGHTS, metadata={"format": "pt"})


def _finite(weights: State) -> State:
    broken = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if broken:
        raise PriorError(f"{len(broken)} tensors are not finite ({', '.join(broken[:4])}): download the file again")
    return weights
