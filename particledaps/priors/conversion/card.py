"""The card of a conversion: ``card.json`` in the folder that it made."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from particledaps.priors.errors import PriorError

CARD = "card.json"


@dataclass(frozen=True)
class ConversionCard:
    """What a converted folder holds and where it comes from.

    Attributes:
        family: the family of ``FAMILIES`` that was asked for, or whose layout the file has.
        source_file: name of the checkpoint.
        source_sha256: of the checkpoint.
        ema: the U-Net's weights are averaged: those under ``model_ema``, or of an entry called an average (guided
            diffusion publishes only one set: false).
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
        num_heads: heads of every attention where ``unet/config.json`` cannot say it (its heads have unequal widths):
            diffusers alone computes another network, :func:`particledaps.priors.unet.set_heads` divides it.
        prediction_type: as in the scheduler's configuration.
        schedule: the betas, as in the scheduler's configuration.
        origins: fact -> where it comes from: the file, an option, a family, its architecture or its SHA-256.
        entry: of the file below which the weights stand, dotted; empty for a flat file.
        other_entries: further entries with weights, left out.
        removed_names: wrapper before or in the keys (``module.``) -> number of keys that it was removed from.
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
    num_heads: int | None = None
    prediction_type: str = "epsilon"
    schedule: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    entry: str = ""
    other_entries: list[str] = field(default_factory=list)
    removed_names: dict[str, int] = field(default_factory=dict)


def read_card(folder: Path) -> ConversionCard:
    """The card of a converted folder.

    Raises:
        PriorError: there is none, or it is damaged.
    """
    path = folder / CARD
    try:
        return ConversionCard(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise PriorError(f"{path} is no card of a converted checkpoint: {error}") from error
