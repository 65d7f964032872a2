"""The four published families: what their files cannot tell, and how they are recognised."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from priors.conversion.mapping import Shapes, State
from priors.conversion.unet import read_architecture
from priors.conversion.unet_mapping import Heads
from priors.prior import PriorError

UNET, EMA, FIRST_STAGE, CLASSES = "model.diffusion_model.", "model_ema.", "first_stage_model.", "cond_stage_model."
ORDERS = ("legacy", "new")
OPTIONS = ("image_size", "num_head_channels", "num_heads", "attention_order")


@dataclass(frozen=True)
class Family:
    """A published model.

    Attributes:
        latent: latent diffusion with a first stage; otherwise a pixel U-Net of guided diffusion.
        classes: conditioned on a class embedding through cross attention.
        ema: its file holds averaged weights beside the raw ones.
        heads: of the published network.
        image_size: side in pixels.
        beta_start: first beta of the noise schedule.
        beta_end: last beta.
        beta_schedule: diffusers' name; latent diffusion's "linear" is linear in sqrt(beta), ``scaled_linear``.
    """

    latent: bool
    classes: bool
    ema: bool
    heads: Heads
    image_size: int
    beta_start: float
    beta_end: float
    beta_schedule: str


_LATENT = {
    "latent": True,
    "image_size": 256,
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
}
_PIXEL = {"latent": False, "image_size": 256, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
FAMILIES = {
    "ldm_ffhq256": Family(classes=False, ema=True, heads=Heads(channels=32), **_LATENT),
    "ldm_imagenet256": Family(classes=True, ema=False, heads=Heads(number=1), **_LATENT),
    "adm_ffhq256": Family(classes=False, ema=False, heads=Heads(channels=64), **_PIXEL),
    "adm_imagenet256": Family(classes=False, ema=False, heads=Heads(channels=64), **_PIXEL),
}


@dataclass(frozen=True)
class Options:
    """What the caller says of an architecture: the values of the family where nothing is said."""

    heads: Heads
    image_size: int


def read_options(family: Family, architecture: Mapping[str, Any] | None) -> Options:
    """The family's values with those of ``architecture`` in their place.

    Raises:
        PriorError: an unknown key or an impossible value.
    """
    given = dict(architecture or {})
    if unknown := sorted(set(given) - set(OPTIONS)):
        raise PriorError(
            f"architecture knows {', '.join(OPTIONS)}, not {', '.join(map(str, unknown))}; the rest is read from shapes"
        )
    order = given.get("attention_order", "legacy")
    if order not in ORDERS:
        raise PriorError(f"attention_order={order} is neither legacy nor new")
    for key in set(given) - {"attention_order"}:
        if isinstance(given[key], bool) or not isinstance(given[key], int) or given[key] < 1:
            raise PriorError(f"{key}={given[key]} is no positive integer")
    if {"num_head_channels", "num_heads"} <= set(given):
        raise PriorError("num_head_channels and num_heads exclude each other")
    channels, number = family.heads.channels, family.heads.number
    if "num_head_channels" in given:
        channels = given["num_head_channels"]
    elif "num_heads" in given:
        channels, number = None, given["num_heads"]
    return Options(Heads(channels, number, order == "legacy"), given.get("image_size", family.image_size))


def recognise(names: Shapes, wanted: str | None) -> str:
    """The family of a checkpoint by its names and shapes, checked against the ``wanted`` one.

    Raises:
        PriorError: it is of none, or of another than ``wanted``.
    """
    if wanted is not None and wanted not in FAMILIES:
        raise PriorError(f"family={wanted} is none of {', '.join(FAMILIES)}")
    found = _recognised(names)
    if wanted is None:
        return found
    a, b = FAMILIES[wanted], FAMILIES[found]
    if (a.latent, a.classes) != (b.latent, b.classes):
        raise PriorError(f"family={wanted} was asked for, but the keys are those of {found}")
    return wanted


def _recognised(names: Shapes) -> str:
    starts = tuple(names)
    if any(n.startswith((f"{CLASSES}transformer.", f"{CLASSES}model.")) for n in starts):
        raise PriorError(
            "this is a Stable Diffusion checkpoint, which is read as a diffusers folder instead (model.path)"
        )
    if any(n.startswith(UNET) for n in starts):
        attended = any(n.startswith(UNET) and ".transformer_blocks." in n for n in starts)
        return "ldm_imagenet256" if attended else "ldm_ffhq256"
    if any(n.startswith(("input_blocks.", "output_blocks.", "middle_block.")) for n in starts):
        return "adm_ffhq256" if read_architecture(names).res_blocks == 1 else "adm_imagenet256"
    if any(n.startswith("down_blocks.") for n in starts):
        raise PriorError("these are weights of a diffusers network already: use their folder without conversion")
    first = ", ".join(starts[:4])
    raise PriorError(f"its keys ({first}, ...) are of none of the known families: {', '.join(FAMILIES)}")


def noise_schedule(family: Family, betas: torch.Tensor | None) -> dict[str, Any]:
    """Diffusers' description of the schedule: that of the file where it holds its betas, else the family's.

    Raises:
        PriorError: the file's betas follow no schedule that diffusers knows.
    """
    facts = {"num_train_timesteps": 1000, "beta_start": family.beta_start, "beta_end": family.beta_end}
    if betas is None:
        return facts | {"beta_schedule": family.beta_schedule}
    values = betas.double().flatten()
    for start, end in ((family.beta_start, family.beta_end), (values[0].item(), values[-1].item())):
        for name, power in (("scaled_linear", 2), ("linear", 1)):
            grid = torch.linspace(start ** (1 / power), end ** (1 / power), len(values), dtype=torch.float64) ** power
            if torch.allclose(values, grid, rtol=1e-5, atol=0):
                return {"num_train_timesteps": len(values), "beta_start": start, "beta_end": end, "beta_schedule": name}
    raise PriorError(
        "its betas are linear neither in beta nor in sqrt(beta); diffusers' scheduler cannot describe them"
    )


def dotless(name: str) -> str:
    """The name under which latent diffusion stores the average of a U-Net's parameter."""
    return f"{EMA}diffusion_model{name.replace('.', '')}"


def strip(state: State, prefix: str) -> State:
    """The tensors under a prefix, by the rest of their names."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
