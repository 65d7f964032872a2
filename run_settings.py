"""What a reconstruction may be told, and whether it can be: the configuration of ``posterior_sample.py``.

A hook is one module with ``PREFIX`` and ``Settings`` (the user's keys), ``conflicts``, ``build`` and ``record``. The
configuration is cut here, once; nothing else takes it whole.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pruning
import repulsion
import resample_opt
import resampling
import restarts
import symmetry
from particledaps.checks import Checks, SettingsError
from particledaps.evaluation.selection import RULES
from particledaps.particles import own_hooks, starts
from particledaps.particles.state import NUM_TIMESTEPS
from particledaps.settings import validation
from particledaps.settings.family import fill_chain, fill_sampler
from particledaps.settings.fingerprint import config_sha256, of_runs
from particledaps.settings.hook_keys import HooksAsked, cut, flat_class
from particledaps.settings.keys import facts
from particledaps.settings.presets import filled_from, preset_of
from particledaps.settings.schema import (
    AUTO,
    ChainConfig,
    CompatSettings,
    DataSettings,
    ModelSettings,
    SamplerConfig,
    TaskSettings,
)

HOOKS = (repulsion, resampling, symmetry, pruning, restarts, resample_opt)
"""In the order in which they are called."""
KEYED = {module.PREFIX: module for module in (*HOOKS, starts)}
HookKeys = flat_class("HookKeys", {prefix: module.Settings for prefix, module in KEYED.items()})
"""The user's keys of all hooks and of the start, at the top level of the configuration."""


@of_runs
@dataclass
class RunSettings(HookKeys):
    """Everything that ``posterior_sample.py`` can be told.

    Attributes:
        name: name of the run; its results are ``<save_dir>/<name>/``.
        save_dir: folder of all results.
        seed: of every random stream.
        num_samples: particles a measurement.
        particle_ids: run only these particles; null means all. Each is exactly as in the full batch as long as nothing
            couples particles (repulsion, pruning, resampling, restarts, crossover, ``optimization_best``).
        use_tpu: run on a TPU (needs torch_xla).
        device: ``auto``, ``cpu`` or ``cuda``.
        gpu: index of the CUDA device.
        precision: ``float32``; or ``bfloat16`` or ``float16`` inside the networks.
        preset: values of the sampler that nobody set: ``auto`` measures them for the prior and the task, and keeps them
            in the run's ``preset.yaml``; or such a file. null: those of the prior's family.
        selection_rule: how the answer is chosen without the truth, see :mod:`particledaps.evaluation.selection`;
            ``posterior`` takes tau from ``optimization_tau``.
        selection_margin: of ``selection_rule=fresh2``: the first particle is the answer unless the data loss of a later
            one is lower by more than this.
        decode_batch: decode and differentiate at most this many particles at once, to save memory; null: all.
        save_trajectory: write the trajectory figures.
        hooks: hooks of your own: ``package.module:Name``, or ``{target: ..., options: {...}}``.
        on_error: an input that cannot be read is named and left out (``continue``), or ends the run (``stop``).
    """

    name: str = field(default="demo", metadata=facts(identity=False))
    save_dir: str = field(default="results", metadata=facts(identity=False))
    seed: int = 42
    num_samples: int = 4
    particle_ids: list[int] | None = None
    use_tpu: bool = field(default=False, metadata=facts(identity=False))
    device: str = field(default="auto", metadata=facts(identity=False))
    gpu: int = field(default=0, metadata=facts(identity=False))
    precision: str = "float32"
    preset: str | None = field(default=None, metadata=facts(identity=False))
    selection_rule: str = "loss"
    selection_margin: float = field(default=0.0, metadata=facts(neutral=0.0))
    decode_batch: int | None = None
    save_trajectory: bool = field(default=True, metadata=facts(identity=False))
    hooks: list[Any] = field(default_factory=list, metadata=facts(neutral=[]))
    on_error: str = field(default="continue", metadata=facts(identity=False))
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    compat: CompatSettings = field(default_factory=CompatSettings)


def with_preset(settings: RunSettings) -> RunSettings:
    """The settings with what the key ``preset`` stands for; as they are where that is still to be measured.

    Raises:
        SettingsError: there is no such preset, or it cannot be read.
    """
    values = preset_of(settings.preset, Path(settings.save_dir) / settings.name, preset_made_for(settings))
    return settings if values is None else replace(settings, sampler=filled_from(values, settings.sampler))


def is_to_be_measured(settings: RunSettings) -> bool:
    """Is ``preset=auto`` asked for, and nothing kept yet?"""
    return settings.preset == AUTO and with_preset(settings) is settings


def preset_made_for(settings: RunSettings) -> str:
    """What ``preset=auto`` measures for: the identity of the settings before it fills them."""
    return config_sha256(asdict(settings))


def follow_family(settings: RunSettings) -> RunSettings:
    """The settings with every null of the sampler that ``sampler.families.<model.family>`` knows filled in.

    Raises:
        SettingsError: see :func:`particledaps.settings.family.fill_sampler`.
    """
    model, sampler = fill_sampler(settings.model, settings.sampler)
    return replace(settings, model=model, sampler=sampler)


def resolve_chain(settings: RunSettings) -> ChainConfig:
    """The MCMC values, with nulls taken from ``task.mcmc.<family>``."""
    own = follow_family(settings)
    return fill_chain(own.model.family, own.sampler, own.task)


def cut_hooks(keys: Any, num_samples: int, particle_ids: list[int] | None = None) -> HooksAsked:
    """The settings of each hook."""
    parts = {prefix: cut(prefix, module.Settings, keys) for prefix, module in KEYED.items()}
    return HooksAsked(num_samples, num_samples if particle_ids is None else len(particle_ids), parts)


def check_hooks(keys: Any, num_samples: int, checks: Checks) -> None:
    """Report every value that no hook could run with."""
    checks.problems += cut_hooks(keys, num_samples).problems(KEYED)


def check_own_hooks(asked: list[Any], checks: Checks) -> None:
    """Report every entry of the key ``hooks`` that names no hook."""
    checks.problems += own_hooks.problems(asked)


def validate(settings: RunSettings) -> None:
    """Check every value, before a prior is loaded.

    Raises:
        SettingsError: with one line a problem: the key, the value, what is allowed.
    """
    checks, data = Checks(), settings.data
    validation.check_results(settings.name, settings.save_dir, checks)
    validation.check_particles(settings.num_samples, settings.particle_ids, checks)
    validation.check_machine(settings.device, settings.gpu, settings.precision, settings.decode_batch, checks)
    checks.choice("selection_rule", settings.selection_rule, RULES)
    checks.number("selection_margin", settings.selection_margin, 0)
    checks.require(
        settings.selection_margin == 0 or settings.selection_rule == "fresh2",
        f"selection_margin={settings.selection_margin:g}: only selection_rule=fresh2 has one",
    )
    checks.number("seed", settings.seed, 0)
    check_hooks(settings, settings.num_samples, checks)
    check_own_hooks(settings.hooks, checks)
    validation.check_data(data, settings.on_error, checks)
    validation.check_task(settings.task, data, checks)
    validation.check_model(settings.model, checks)
    try:
        own = follow_family(settings)
        validation.check_loop(own.sampler.annealing, own.sampler.ode, own.compat, checks)
        _check_last_level(own, checks)
        validation.check_chain(resolve_chain(own), own.compat, checks)
    except SettingsError as error:
        checks.problems.append(str(error))
    checks.finish()


def _check_last_level(settings: RunSettings, checks: Checks) -> None:
    """Hooks that begin at a time must have a level that late."""
    count = settings.sampler.annealing.num_steps
    last_t = NUM_TIMESTEPS / max(count, 1)
    checks.require(
        settings.pruning_step < 0 or last_t <= settings.pruning_step,
        f"pruning_step={settings.pruning_step}: no level is that late; the last of {count} levels has t = {last_t:g}",
    )
    checks.require(
        settings.optimization_step < 0 or settings.optimization_when == "end" or last_t <= settings.optimization_step,
        f"optimization_step={settings.optimization_step}: no level is that late (the last has t = {last_t:g}); "
        "use optimization_when=end",
    )
