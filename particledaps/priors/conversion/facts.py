"""Facts of a network that its tensors do not tell: from the file, an option or a published model, never by guessing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from particledaps.priors.conversion.families import FAMILIES, siblings
from particledaps.priors.conversion.first_stage import FirstStageArchitecture
from particledaps.priors.conversion.options import Options
from particledaps.priors.conversion.schedule import published_schedule, same_betas, schedule_text, stored_schedule
from particledaps.priors.conversion.unet import UNetArchitecture
from particledaps.priors.conversion.unet_mapping import Heads, attended_widths
from particledaps.priors.errors import PriorError

OPTION = "an option"
FILE = "the file"
ARCHITECTURE = "its architecture"
CHECKSUM = "its SHA-256"
DEFAULT = "the default"
ASK = {
    "heads": "num_heads=N or num_head_channels=N",
    "image size": "image_size=N",
    "betas": "beta_schedule=linear|scaled_linear|cosine (the first two with beta_start=N beta_end=N)",
    "null class": "null_class=INDEX|none",
}


@dataclass(frozen=True)
class Layout:
    """What the tensors tell.

    Attributes:
        unet: architecture of the U-Net.
        first_stage: architecture of the first stage, or None for a pixel U-Net.
        rows: of the class embedding, or None.
        betas: of the noise schedule, where the file has them.
        attends: whether the U-Net has attention.
    """

    unet: UNetArchitecture
    first_stage: FirstStageArchitecture | None = None
    rows: int | None = None
    betas: torch.Tensor | None = None
    attends: bool = True


@dataclass(frozen=True)
class Facts:
    """All that a conversion needs beside the tensors.

    Attributes:
        heads: how attention is divided.
        image_size: side in pixels.
        schedule: diffusers' description of the betas.
        prediction_type: diffusers' name of what the network predicts.
        null_class: the class that means "none", or None.
        origins: fact -> where it comes from.
    """

    heads: Heads
    image_size: int
    schedule: dict[str, Any]
    prediction_type: str
    null_class: int | None
    origins: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """Why a file is taken for a published model.

    Attributes:
        name: of the family.
        asked: the caller names it.
        exact: the architecture is the published one.
        by_checksum: whether the file's SHA-256 is the published one; read only where nothing else tells.
    """

    name: str
    asked: bool
    exact: bool
    by_checksum: Callable[[], bool]

    def why(self, shapes_tell: bool) -> str | None:
        """The reason to take a fact from the published model; None where there is none."""
        if self.asked:
            return f"family {self.name}" + ("" if self.exact else ", although its architecture is another")
        if shapes_tell and self.exact:
            return ARCHITECTURE
        return CHECKSUM if self.by_checksum() else None


def is_published(layout: Layout, name: str) -> bool:
    """Whether the architecture is exactly that of the published model."""
    family = FAMILIES[name]
    return (layout.unet, layout.first_stage, layout.rows) == (family.unet, family.first_stage, family.rows)


def find_facts(layout: Layout, options: Options, known: Known) -> Facts:
    """Every fact with its origin.

    Raises:
        PriorError: an option does not fit the network, or a fact is told by nothing; the options are named.
    """
    family = FAMILIES[known.name]
    _check_options(layout, options, family.classes)
    found = {
        "heads": _heads(layout, options, known),
        "image size": _said(options.image_size) or _published(family.image_size, known, True),
        "betas": _schedule(layout, options, known),
        "null class": _null_class(layout, options, known),
        "prediction type": _said(options.prediction_type) or ("epsilon", DEFAULT),
    }
    if missing := [name for name, value in found.items() if value is None]:
        raise PriorError(_request(missing, known.name))
    values = {name: value for name, (value, _) in found.items()}
    return Facts(
        values["heads"],
        values["image size"],
        values["betas"],
        values["prediction type"],
        values["null class"],
        {name: origin for name, (_, origin) in found.items() if origin},
    )


def _request(missing: list[str], name: str) -> str:
    listed = missing[-1] if len(missing) == 1 else f"{', '.join(missing[:-1])} and {missing[-1]}"
    return (
        f"its tensors do not tell its {listed}, and nothing says that it is a published model; add --architecture "
        f"{', '.join(ASK[m] for m in missing)}, or --family NAME if it is one ({', '.join(siblings(name))})"
    )


def _check_options(layout: Layout, options: Options, conditional: bool) -> None:
    for width in attended_widths(layout.unet) if options.heads else []:
        options.heads.count(width)
    classes = layout.unet.classes if layout.rows is None else layout.rows
    null = options.null_class
    if null is not None and classes is None and not conditional:  # a conditional file that lacks them is not whole
        raise PriorError(f"null_class={null}: this network knows no classes; leave it out")
    if isinstance(null, int) and classes is not None and null >= classes:
        raise PriorError(f"null_class={null}: this network knows the classes 0 to {classes - 1}")
    if layout.betas is not None and options.schedule and not same_betas(layout.betas, options.schedule):
        raise PriorError(
            f"the file holds betas of its own, which are not those of beta_schedule={schedule_text(options.schedule)};"
            " leave it out"
        )


def _said(value: Any) -> tuple[Any, str] | None:
    return None if value is None else (value, OPTION)


def _published(value: Any, known: Known, shapes_tell: bool) -> tuple[Any, str] | None:
    why = known.why(shapes_tell)
    return None if why is None else (value, why)


def _heads(layout: Layout, options: Options, known: Known) -> tuple[Heads, str] | None:
    if options.heads is not None:
        return options.heads, OPTION
    if not layout.attends:
        return Heads(), ""
    published = replace(FAMILIES[known.name].heads, legacy=options.legacy)
    return _published(published, known, True)


def _schedule(layout: Layout, options: Options, known: Known) -> tuple[dict[str, Any], str] | None:
    """The architecture alone does not tell on which betas a network was trained."""
    family = FAMILIES[known.name]
    if layout.betas is not None:
        return stored_schedule(family, layout.betas), FILE
    return _said(options.schedule) or _published(published_schedule(family), known, False)


def _null_class(layout: Layout, options: Options, known: Known) -> tuple[int | None, str] | None:
    """Only class embeddings of latent diffusion have one; a guided diffusion network has none unless it is said."""
    if options.null_class is not None:
        return (None if options.null_class == "none" else options.null_class), OPTION
    if layout.rows is None:
        return None, ""
    published = FAMILIES[known.name].null_class(layout.rows)
    return None if published is None else _published(published, known, True)
