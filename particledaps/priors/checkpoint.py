"""One entry for every checkpoint in diffusers' layout: what the folder holds decides who loads it."""

from __future__ import annotations

from particledaps.priors.asked_conditions import refuse_unfit
from particledaps.priors.conditioning import tell
from particledaps.priors.diffusers_folder import CheckpointFolder, LoadOptions
from particledaps.priors.errors import PriorError
from particledaps.priors.latent_diffusion import load_latent_diffusion
from particledaps.priors.pixel_unet import load_pixel_unet
from particledaps.priors.prior import Prior
from particledaps.priors.stable_diffusion import load_stable_diffusion

LOADERS = {"pixel": load_pixel_unet, "ldm": load_latent_diffusion, "sd": load_stable_diffusion}
KINDS = {"ldm": ("ldm",), "adm": ("pixel",), "diffusers": tuple(LOADERS)}
HOLDS = {
    "pixel": "a pixel network (no vae)",
    "ldm": "a latent network without text",
    "sd": "a text-conditional latent network",
}


def load_checkpoint(folder: CheckpointFolder, kind: str, options: LoadOptions) -> Prior:
    """Load the prior in a folder.

    Args:
        folder: see :func:`particledaps.priors.diffusers_folder.open_folder`.
        kind: ``ldm``, ``adm`` or ``diffusers`` (anything).
        options: device, type, condition and conventions.

    Raises:
        PriorError: the folder holds another kind, is damaged, or an option does not fit it.
    """
    family = folder.family
    if family not in KINDS[kind]:
        fitting = ", ".join(k for k, families in KINDS.items() if family in families)
        raise PriorError(f"model.kind={kind}: {folder.name} holds {HOLDS[family]}; use model.kind={fitting}")
    refuse_unfit(folder.name, folder.condition_kind, options)  # before the weights are read
    prior = LOADERS[family](folder, options)
    for module in (prior.autoencoder, prior.denoiser):
        module.eval().requires_grad_(False)
    return tell(prior, options)
