"""From settings to objects: prior, operator, sampler settings."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from diffusion.mcmc import ChainSettings
from diffusion.paths import PATHS
from operators.operator import Operator
from priors.prior import Prior, in_autocast
from runs.checks import SettingsError
from runs.custom import call_target
from runs.family import ROOT
from runs.operators import OPERATORS
from runs.settings import (
    FOLDER_KINDS,
    AnnealingSettings,
    ChainConfig,
    CompatSettings,
    ModelSettings,
    OdeSettings,
    TaskSettings,
    operator_arguments,
)
from sampler import SamplerSettings

if TYPE_CHECKING:  # diffusers takes seconds to import: only where a prior is loaded
    from priors.diffusers_folder import LoadOptions

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def build_prior(
    model: ModelSettings, compat: CompatSettings, precision: str, decode_batch: int | None, device: torch.device
) -> Prior:
    """Load the prior that ``model`` names.

    Args:
        model: which one.
        compat: conventions of the official code.
        precision: of its networks, a key of :data:`PRECISIONS`.
        decode_batch: see :class:`priors.prior.Prior`.
        device: where it computes.

    Raises:
        SettingsError: ``model.target`` names no factory of priors.
        PriorError: the prior cannot be loaded.
    """
    dtype = PRECISIONS[precision]
    if model.kind in FOLDER_KINDS:
        from priors.checkpoint import load_checkpoint
        from priors.diffusers_folder import open_folder

        # their weights are kept in that type
        prior = load_checkpoint(open_folder(model.path, ROOT), model.kind, load_options(model, compat, device, dtype))
        return replace(prior, decode_batch=decode_batch)
    if model.kind == "custom":
        arguments = {"device": device, "compat": compat, **model.options}
        prior = call_target("model.target", model.target, Prior, **arguments)
    else:
        from priors.embedded import load_embedded

        prior = load_embedded(ROOT / model.path, device)
    prior = replace(prior, decode_batch=decode_batch)
    return prior if dtype == torch.float32 else in_autocast(prior, dtype)


def load_options(
    model: ModelSettings, compat: CompatSettings, device: torch.device, dtype: torch.dtype
) -> "LoadOptions":
    """What :mod:`priors` needs to know of the settings to load a checkpoint."""
    from priors.diffusers_folder import LoadOptions

    return LoadOptions(
        device=device,
        dtype=dtype,
        timestep_map=compat.timestep_map,
        ema=compat.ema,
        quantize_in_decode=compat.quantize_in_decode,
        class_id=model.class_id,
        prompt=model.prompt,
        guidance_scale=model.guidance_scale,
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
            return call_target("task.target", task.target, Operator, **task.options)
        return OPERATORS[task.kind](**task.options, **operator_arguments(task))
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"task.options.{error}") from error


def build_sampler_settings(
    annealing: AnnealingSettings, ode: OdeSettings, chain: ChainConfig, compat: CompatSettings, is_pixel: bool = False
) -> SamplerSettings:
    """Paths, chain and likelihood of the annealing loop, from values without nulls.

    A pixel prior has no gradients clamped (as in DAPS).
    """
    path = PATHS[annealing.schedule](annealing.num_steps, annealing.sigma_max, annealing.sigma_min)

    def inner_path(sigma: float) -> torch.Tensor:
        return PATHS[ode.schedule](ode.num_steps, sigma, ode.sigma_min, end=compat.inner_end)

    return SamplerSettings(
        path=path,
        inner_path=inner_path,
        chain=ChainSettings(chain.kernel, chain.num_steps, chain.step_size, chain.momentum, chain.curvature_limit),
        step_size_min_ratio=chain.step_size_min_ratio,
        tau=chain.tau,
        prior_term=chain.prior,
        prior_sigma=chain.prior_sigma,
        solver=ode.solver,
        likelihood_half=compat.likelihood_half,
        gradient_clamp=None if is_pixel else compat.gradient_clamp,
        ratio_counts_end=compat.ratio_counts_end,
    )
