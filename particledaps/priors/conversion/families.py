"""The four published families: what their files cannot tell, and how they are recognised."""

from __future__ import annotations

from dataclasses import dataclass

from particledaps.priors.conversion.first_stage import FirstStageArchitecture
from particledaps.priors.conversion.mapping import Shapes, State
from particledaps.priors.conversion.options import OPTIONS, Options, read_options
from particledaps.priors.conversion.unet import UNetArchitecture, read_architecture
from particledaps.priors.conversion.unet_mapping import Heads
from particledaps.priors.errors import PriorError

__all__ = ["FAMILIES", "OPTIONS", "Family", "Options", "dotless", "read_options", "recognise", "siblings", "strip"]
UNET = "model.diffusion_model."
EMA = "model_ema."
FIRST_STAGE = "first_stage_model."
CLASSES = "cond_stage_model."


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
        unet: architecture of the published U-Net.
        first_stage: architecture of the published first stage, or None.
        rows: of the published class embedding, the last of which means "none"; None: there is no embedding.
    """

    latent: bool
    classes: bool
    ema: bool
    heads: Heads
    image_size: int
    beta_start: float
    beta_end: float
    beta_schedule: str
    unet: UNetArchitecture
    first_stage: FirstStageArchitecture | None = None
    rows: int | None = None

    def null_class(self, rows: int | None) -> int | None:
        """The class that means "none" of the published model; None where ``rows`` are not those of it."""
        return rows - 1 if rows is not None and rows == self.rows else None


def _unet(
    channels: tuple[int, ...], res_blocks: int, attended: tuple[int, ...], pixel: bool, context: int | None
) -> UNetArchitecture:
    return UNetArchitecture(
        in_channels=3,
        out_channels=6 if pixel else 3,
        channels=channels,
        res_blocks=res_blocks,
        attention=tuple(level in attended for level in range(len(channels))),
        resblock_updown=pixel,
        scale_shift=pixel,
        context_dim=context,
    )


_LATENT = {
    "latent": True,
    "image_size": 256,
    "beta_start": 0.0015,
    "beta_end": 0.0195,
    "beta_schedule": "scaled_linear",
    "first_stage": FirstStageArchitecture(3, 3, (128, 256, 512), 2, (False,) * 3, True, (8192, 3)),
}
_PIXEL = {
    "latent": False,
    "classes": False,
    "ema": False,
    "heads": Heads(channels=64),
    "image_size": 256,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
}
FAMILIES = {
    "ldm_ffhq256": Family(
        classes=False,
        ema=True,
        heads=Heads(channels=32),
        unet=_unet((224, 448, 672, 896), 2, (1, 2, 3), False, None),
        **_LATENT,
    ),
    "ldm_imagenet256": Family(
        classes=True,
        ema=False,
        heads=Heads(number=1),
        unet=_unet((192, 384, 576, 960), 2, (1, 2, 3), False, 512),
        rows=1001,
        **_LATENT,
    ),
    "adm_ffhq256": Family(unet=_unet((128, 128, 256, 256, 512, 512), 1, (4,), True, None), **_PIXEL),
    "adm_imagenet256": Family(unet=_unet((256, 256, 512, 512, 1024, 1024), 2, (3, 4, 5), True, None), **_PIXEL),
}


def recognise(names: Shapes, wanted: str | None) -> str:
    """The family whose layout a checkpoint has, by its names, checked against the ``wanted`` one.

    Raises:
        PriorError: it is of none, or of another than ``wanted``.
    """
    if wanted is not None and wanted not in FAMILIES:
        raise PriorError(f"family={wanted} is none of {', '.join(FAMILIES)}")
    found = _recognised(names)
    if wanted is None:
        return found
    if wanted not in siblings(found):
        raise PriorError(f"family={wanted} was asked for, but the keys are those of {found}")
    return wanted


def siblings(name: str) -> list[str]:
    """The families with the layout of this one, itself among them."""
    own = FAMILIES[name]
    return [other for other, f in FAMILIES.items() if (f.latent, f.classes) == (own.latent, own.classes)]


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


def dotless(name: str) -> str:
    """The name under which latent diffusion stores the average of a U-Net's parameter."""
    return f"{EMA}diffusion_model{name.replace('.', '')}"


def strip(state: State, prefix: str) -> State:
    """The tensors under a prefix, by the rest of their names."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
