"""From settings to objects: prior, operator, sampler settings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from particledaps.checkout import ROOT
from particledaps.checks import SettingsError
from particledaps.operators.operator import Operator
from particledaps.priors.conditioning import tell
from particledaps.priors.prior import Prior, in_autocast
from particledaps.settings.custom import call_target
from particledaps.settings.schema import (
    FOLDER_KINDS,
    CompatSettings,
    ModelSettings,
    TaskSettings,
    operator_arguments,
)
from particledaps.settings.tasks import OPERATORS

if TYPE_CHECKING:  # diffusers takes seconds to import: only where a prior is loaded
    from particledaps.priors.diffusers_folder import LoadOptions

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_prior(
    model: ModelSettings, compat: CompatSettings, precision: str, decode_batch: int | None, device: torch.device
) -> Prior:
    """Load the prior that ``model`` names.

    Args:
        model: which one.
        compat: conventions of the official code.
        precision: of its networks, a key of :data:`PRECISIONS`.
        decode_batch: see :class:`particledaps.priors.prior.Prior`.
        device: where it computes.

    Raises:
        SettingsError: ``model.target`` names no factory of priors.
        PriorError: the prior cannot be loaded.
    """
    dtype = PRECISIONS[precision]
    if model.kind in FOLDER_KINDS:
        from particledaps.priors.checkpoint import load_checkpoint
        from particledaps.priors.diffusers_folder import open_folder

        # their weights are kept in that type
        prior = load_checkpoint(
            open_folder(given("model.path", model.path), ROOT), model.kind, load_options(model, compat, device, dtype)
        )
        return replace(prior, decode_batch=decode_batch)
    if model.kind == "custom":
        arguments = {"device": device, "compat": compat, **model.options}
        prior = call_target("model.target", given("model.target", model.target), Prior, **arguments)
    else:
        from particledaps.priors.embedded import load_embedded

        prior = load_embedded(ROOT / given("model.path", model.path), device)
    prior = replace(tell(prior, model), decode_batch=decode_batch)
    return prior if dtype == torch.float32 else in_autocast(prior, dtype)


def given(key: str, value: str | None) -> str:
    """A value that is needed here.

    Raises:
        SettingsError: it is null.
    """
    if value is None:
        raise SettingsError(f"{key} is not set: add {key}=VALUE")
    return value


def load_options(model: ModelSettings, compat: CompatSettings, device: torch.device, dtype: torch.dtype) -> LoadOptions:
    """What :mod:`priors` needs to know of the settings to load a checkpoint."""
    from particledaps.priors.diffusers_folder import LoadOptions

    return LoadOptions(
        device=device,
        dtype=dtype,
        timestep_map=compat.timestep_map,
        ema=compat.ema,
        quantize_in_decode=compat.quantize_in_decode,
        class_id=model.class_id,
        prompt=model.prompt,
        guidance_scale=model.guidance_scale,
        negative_class_id=model.negative_class_id,
        negative_prompt=model.negative_prompt,
        guidance_rescale=model.guidance_rescale,
        guidance_interval=model.guidance_interval,
        latent_scale=model.latent_scale,
        image_size=model.image_size,
    )


def build_operator(task: TaskSettings) -> Operator:
    """The measurement operator that ``settings.task`` names.

    Raises:
        SettingsError: the factory cannot be called or refuses its arguments, or weights are missing.
    """
    try:
        if task.kind == "custom":
            return call_target("task.target", given("task.target", task.target), Operator, **task.options)
        return OPERATORS[task.kind](**task.options, **operator_arguments(task))
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"task.options.{error}") from error
