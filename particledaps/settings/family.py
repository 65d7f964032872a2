"""Sampler values that follow the family of the prior (pixel, ldm, sd, ...), so that nobody chooses them twice."""

from __future__ import annotations

import dataclasses
from typing import Any

from particledaps.checkout import ROOT
from particledaps.checks import SettingsError
from particledaps.settings.schema import ChainConfig, ModelSettings, SamplerConfig, TaskSettings


def prior_family(model: ModelSettings) -> str:
    """``model.family``, or what the folder of a ``diffusers`` model shows it to be.

    Raises:
        SettingsError: it is null for another kind of model.
        PriorError: there is no such folder.
    """
    if model.family is not None:
        return model.family
    if model.kind != "diffusers":
        raise SettingsError("model.family is not set: choose pixel, ldm or sd")
    if not model.path:
        raise SettingsError("model.path is not set: a folder or a hub id")
    from particledaps.priors.diffusers_folder import open_folder

    return open_folder(model.path, ROOT).family


def fill_sampler(model: ModelSettings, sampler: SamplerConfig) -> tuple[ModelSettings, SamplerConfig]:
    """The model with its family, and the sampler with every null filled in that ``families.<family>`` knows.

    MCMC values that stay null are those of ``task.mcmc.<family>``. A sampler without nulls stays as it is.

    Raises:
        SettingsError: the annealing or the ODE has a value that is set nowhere.
    """
    family = prior_family(model)
    fallback = sampler.families.get(family)
    parts = {
        name: _filled(getattr(sampler, name), getattr(fallback, name, None)) for name in ("annealing", "ode", "mcmc")
    }
    for part in ("annealing", "ode"):
        for name, value in vars(parts[part]).items():
            if value is None:
                raise SettingsError(
                    f"sampler.{part}.{name} is not set and sampler.families has no value for model.family={family} "
                    f"(it knows {', '.join(sampler.families) or 'none'}); choose e.g. sampler=latent_daps_small"
                )
    return dataclasses.replace(model, family=family), dataclasses.replace(sampler, **parts, families={})


def fill_chain(family: str, sampler: SamplerConfig, task: TaskSettings) -> ChainConfig:
    """The sampler's MCMC values, with nulls taken from ``task.mcmc.<family>``.

    Raises:
        SettingsError: a value is set nowhere.
    """
    chain, fallback = sampler.mcmc, task.mcmc.get(family, ChainConfig())
    names = ("kernel", "num_steps", "step_size", "step_size_min_ratio", "momentum", "tau")
    values = {n: getattr(fallback, n) if getattr(chain, n) is None else getattr(chain, n) for n in names}
    missing = [n for n, v in values.items() if v is None]
    if missing:
        raise SettingsError(
            f"sampler.mcmc.{missing[0]} is not set and task.mcmc has no value for model.family={family} "
            f"(it knows {', '.join(task.mcmc) or 'none'}); choose e.g. sampler=latent_daps_small"
        )
    return dataclasses.replace(chain, **values)


def followed_config(config: dict[str, Any], model: ModelSettings, sampler: SamplerConfig) -> dict[str, Any]:
    """A merged configuration with the values that :func:`fill_sampler` found."""
    return config | {"model": config["model"] | {"family": model.family}, "sampler": dataclasses.asdict(sampler)}


def _filled(given: Any, fallback: Any) -> Any:
    nulls = [name for name, value in vars(given).items() if value is None]
    return dataclasses.replace(given, **{name: getattr(fallback, name, None) for name in nulls})
