"""Checkpoints of latent diffusion and guided diffusion -> a folder in diffusers' layout, with a card.

Networks are diffusers' own classes; a conversion is a renaming (priors/conversion/), so outputs stay the same.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors import SafetensorError
from safetensors.torch import save_file

from particledaps.priors.cards import read_cards
from particledaps.priors.conversion.card import CARD, ConversionCard, read_card
from particledaps.priors.conversion.checkpoint import read_content, sha256
from particledaps.priors.conversion.facts import Facts, Known, find_facts, is_published
from particledaps.priors.conversion.families import FAMILIES, read_options, recognise
from particledaps.priors.conversion.mapping import State, shapes_of
from particledaps.priors.conversion.nesting import Weights, find_weights
from particledaps.priors.conversion.parts import Contents, Part, read_latent, read_layout, read_pixel
from particledaps.priors.conversion.unet_mapping import unequal_heads
from particledaps.priors.errors import PriorError

UNET = "unet"
VAE = "vae"
SCHEDULER = "scheduler"
CLASSES = "class_embedding.safetensors"
__all__ = ["ConversionCard", "convert_checkpoint", "read_card"]
WEIGHTS = "diffusion_pytorch_model.safetensors"
IDENTITY = ("family", "source_sha256", "ema", "architecture")


def convert_checkpoint(
    source: Path,
    target: Path,
    family: str | None = None,
    ema: bool = True,
    architecture: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> ConversionCard:
    """Write the networks of a checkpoint as safetensors in diffusers' layout.

    Every key of the file is used once or dropped for a stated reason. The folder appears whole or not at all.

    Args:
        source: PyTorch checkpoint or safetensors of a family in ``FAMILIES``; flat or below entries, see
            :mod:`particledaps.priors.conversion.nesting`.
        target: folder to create; one that holds the same conversion is left as it is.
        family: the published model that the file is, or None: only its layout is recognised, from keys and shapes.
        ema: use averaged weights where the file has them.
        architecture: what the tensors do not tell, where it is not a published model or differs from it:
            ``image_size``, ``num_head_channels`` or ``num_heads``, ``attention_order`` (``legacy`` or ``new``),
            ``beta_schedule`` (``linear``, ``scaled_linear`` or ``cosine``) with ``beta_start``, ``beta_end`` and
            ``num_train_timesteps``, ``prediction_type`` and ``null_class`` (an index or ``none``).
        report: called with a line before each long step.

    Returns:
        The card, also written as ``card.json``.

    Raises:
        PriorError: the file cannot be read safely, is of no known family, or keys are missing, unexpected, misshapen
            or not finite; a fact is told by nothing; or ``target`` exists and holds something else.
    """
    source, target = Path(source), Path(target)
    if os.path.lexists(target):
        _existing_card(target)
    report(f"opening {source}")
    content, weights = read_content(source), Weights({})
    digest = cache(lambda: _digest(source, report))
    try:
        weights = find_weights(content, ema)
        name = recognise(shapes_of(weights.state), family)
        contents, facts = _read(weights, name, family is not None, ema, architecture, digest)
    except PriorError as error:
        raise PriorError(f"{source}: {error}{weights.where()}") from error
    report(f"{name}: {len(weights.state)} keys fit")
    card = _card(source, name, contents, facts, weights, dict(architecture or {}), digest())
    if os.path.lexists(target):
        return _existing(target, card)
    try:
        _write(target, contents, card, report)
    except PriorError as error:
        raise PriorError(f"{source}: {error}") from error
    return card


def _digest(source: Path, report: Callable[[str], None]) -> str:
    report("reading the file's SHA-256")
    return sha256(source)


def _read(
    weights: Weights,
    name: str,
    asked: bool,
    ema: bool,
    architecture: Mapping[str, Any] | None,
    digest: Callable[[], str],
) -> tuple[Contents, Facts]:
    family = FAMILIES[name]
    options = read_options(architecture)
    state = weights.state
    layout = read_layout(state, family)
    known = Known(name, asked, is_published(layout, name), lambda: _is_published_file(name, digest))
    facts = find_facts(layout, options, known)
    if family.latent:
        contents = read_latent(state, family, layout, facts, ema and not weights.averaged)
    else:
        contents = read_pixel(state, layout, facts)
    return replace(contents, ema=contents.ema or weights.averaged), facts


def _is_published_file(name: str, digest: Callable[[], str]) -> bool:
    sums = [card.sha256 for card in read_cards().values() if card.family == name and card.sha256]
    return bool(sums) and digest() in sums


def _card(
    source: Path,
    family: str,
    contents: Contents,
    facts: Facts,
    weights: Weights,
    architecture: dict[str, Any],
    digest: str,
) -> ConversionCard:
    parts = {UNET: contents.unet} | ({VAE: contents.vae} if contents.vae else {})
    classes = contents.architecture.classes if contents.classes is None else len(contents.classes)
    return ConversionCard(
        family=family,
        source_file=source.name,
        source_sha256=digest,
        ema=contents.ema,
        architecture=architecture,
        source_keys=len(weights.state),
        used_keys=contents.used,
        dropped=contents.dropped,
        reasons=contents.reasons,
        dropped_rows={key: list(rows) for key, rows in contents.dropped_rows.items()},
        parameters={name: part.parameters for name, part in parts.items()},
        image_range=[-1, 1],
        image_size=facts.image_size,
        latent_scale=contents.latent_scale,
        num_classes=classes,
        null_class=facts.null_class,
        learned_sigma=contents.architecture.learned_sigma,
        num_heads=unequal_heads(contents.architecture, facts.heads),
        prediction_type=facts.prediction_type,
        schedule=facts.schedule,
        origins=facts.origins,
        entry=weights.entry,
        other_entries=weights.others,
        removed_names=weights.removed,
    )


def _existing_card(target: Path) -> ConversionCard:
    if not (target / CARD).is_file():
        raise PriorError(f"{target} exists and is no converted checkpoint: choose another folder or remove it")
    return read_card(target)


def _existing(target: Path, card: ConversionCard) -> ConversionCard:
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


def _write(target: Path, contents: Contents, card: ConversionCard, report: Callable[[str], None]) -> None:
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
        scheduler = DDIMScheduler(
            **card.schedule, clip_sample=False, set_alpha_to_one=False, prediction_type=card.prediction_type
        )
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
