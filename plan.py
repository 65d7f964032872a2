"""What a reconstruction may be told: its hooks in their order, whether they can act, and what they leave behind.

A hook is one module with ``PREFIX`` and ``Settings`` (the user's keys), ``conflicts``, ``build`` and ``record``. The
configuration is cut here, once; nothing else takes it whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import pruning
import repulsion
import resample_opt
import resampling
import restarts
import symmetry
from particledaps.checks import Checks, SettingsError
from particledaps.evaluation.selection import RULES
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.particles import own_hooks, starts
from particledaps.particles.clean_estimate import measured_covariance
from particledaps.particles.hook_setup import Setup
from particledaps.particles.starts import WarmStart, build_start
from particledaps.particles.state import NUM_TIMESTEPS, Hook, Info, Start
from particledaps.runs.clock import PhaseClock, PhaseHook
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
from sampler import LatentDAPS, SamplerSettings, build_sampler_settings

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior
    from particledaps.streams import ParticleStreams

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


@dataclass(frozen=True)
class Plan:
    """How the particles of a measurement are sampled: the annealing loop with the hooks of each image.

    A :class:`particledaps.runs.method.Method`.

    Attributes:
        setup: prior, operator, levels and what was asked for.
        settings: of the annealing loop.
        warm_start: where the particles begin; None for pure noise.
        own: hooks of the user's own, as the key ``hooks`` names them; called after the others.
    """

    setup: Setup
    settings: SamplerSettings
    warm_start: WarmStart | None = None
    own: tuple[Any, ...] = ()

    @property
    def prior(self) -> Prior:
        """The prior."""
        return self.setup.prior

    def with_prior(self, prior: Prior) -> Plan:
        """The same plan for the same prior with another ``decode_batch``."""
        start = None if self.warm_start is None else replace(self.warm_start, prior=prior)
        return replace(self, setup=replace(self.setup, prior=prior), warm_start=start)

    def for_operator(self, operator: Operator) -> Plan:
        """The same plan for an image with an operator of its own, which knows what was not measured."""
        start = None if self.warm_start is None else replace(self.warm_start, operator=operator)
        return replace(self, setup=replace(self.setup, operator=operator), warm_start=start)

    @property
    def num_levels(self) -> int:
        """Of the annealing loop."""
        return self.settings.num_levels

    @property
    def prune_level(self) -> int | None:
        """Level at whose end particles are pruned."""
        return self.setup.level_at(self.setup.asked["pruning"].step)

    @property
    def optimize_level(self) -> int | None:
        """First level at which latents may be optimised (``K`` where no level is late enough: only the end is)."""
        return resample_opt.first_level(self.setup.asked["optimization"], self.setup)

    @property
    def tau(self) -> float:
        """Standard deviation of the chain's likelihood."""
        return self.settings.tau

    @property
    def selection_tau(self) -> float:
        """Standard deviation of the likelihood where the answer is chosen beside the prior."""
        tau = self.setup.asked["optimization"].tau
        return self.setup.operator.noise_sigma if tau is None else tau

    @property
    def phases(self) -> list[str]:
        """Names of the phases, in order."""
        prunes, optimises = self.prune_level is not None, self.optimize_level is not None
        if prunes and optimises:
            return ["pre_pruning", "post_pruning_pre_optimization", "optimization"]
        if prunes:
            return ["pre_pruning", "post_pruning"]
        return ["pre_optimization", "optimization"] if optimises else ["sampling"]

    @cached_property
    def built(self) -> dict[str, Hook | None]:
        """The hooks by prefix, in their order; None where one is off.

        Raises:
            SettingsError, PriorError: a hook cannot act.
        """
        return {module.PREFIX: module.build(self.setup.asked[module.PREFIX], self.setup) for module in HOOKS}

    @cached_property
    def own_hooks(self) -> list[Hook]:
        """Hooks of the user's own.

        Raises:
            SettingsError: one cannot be made.
        """
        return list(own_hooks.build(list(self.own), self.setup))

    def sampler(self, clock: PhaseClock, watchers: Sequence[Hook]) -> LatentDAPS:
        """The loop for one image; ``watchers`` are called after the hooks."""
        hooks, first = [*self.hooks(clock), *watchers], self.setup.asked.num_samples
        return LatentDAPS(self.prior, self.setup.operator, self.settings, hooks, first)

    def first_state(
        self, y: torch.Tensor, streams: ParticleStreams, particle_ids: list[int]
    ) -> tuple[Start | None, dict[str, Any] | None]:
        """Where the particles of ``y`` ``(1, ...)`` begin (None: as pure noise), and what the record says of it."""
        return (None, None) if self.warm_start is None else self.warm_start(y, streams, particle_ids)

    def why_diverged(self, y: torch.Tensor, count: int) -> str:
        """The likely reason why all ``count`` particles of ``y`` became non-finite, and what to do."""
        prior = self.prior
        sigma = self.settings.gate_path[0]
        chain = self.settings.chain
        z = sigma * torch.ones(count, *prior.latent_shape, device=y.device)
        with torch.no_grad():
            denoised = prior.denoiser(z, sigma.to(z))
        decoded = prior.decode(denoised)
        if not (denoised.isfinite().all() and decoded.isfinite().all()):
            return (
                "every particle diverged: the prior's networks return numbers that are not finite (damaged weights, "
                "or too little range: precision=float32)"
            )
        if not self.setup.operator.loss(decoded, y.expand(len(z), *y.shape[1:])).isfinite().all():
            largest = y.abs().max().item()
            return f"every particle diverged: the measurement is out of scale (values up to {largest:.3g})"
        return (
            f"every particle diverged: the chain is unstable here; lower sampler.mcmc.step_size={chain.step_size:g}, "
            f"or raise sampler.mcmc.tau={self.settings.tau:g}"
        )

    def hooks(self, clock: PhaseClock) -> list[Hook]:
        """The hooks that are on, with the phase changes between them."""
        hooks: list[Hook] = []
        for prefix, hook in self.built.items():
            if hook is None:
                continue
            if prefix == "optimization":
                hooks += self._phase_of_optimisation(hook, hooks, clock)
            hooks.append(hook)
            if prefix == "pruning":
                hooks.append(PhaseHook(clock, self.phases[1], self.prune_level))
        return hooks + self.own_hooks

    def _phase_of_optimisation(self, hook: Hook, before: list[Hook], clock: PhaseClock) -> list[Hook]:
        level = hook.from_level
        if level is not None and level == self.prune_level:  # nothing lies between pruning and optimisation
            before[:] = [h for h in before if not isinstance(h, PhaseHook)]
            clock.skip(self.phases[1])
        return [PhaseHook(clock, self.phases[-1], level)]

    def record(self, info: Info, particle_ids: list[int]) -> dict[str, Any]:
        """What the hooks did to one image, by the names of ``metrics.json``."""
        parts = (m.record(self.setup.asked[m.PREFIX], self.built[m.PREFIX], info, particle_ids) for m in HOOKS)
        shipped = {name: value for part in parts for name, value in part.items()}
        moved = info.rows.get("encoder")
        return shipped | {"encoder": moved and {"per_step": moved}, "hooks": own_hooks.record(list(self.own), info)}


def loop_settings(settings: RunSettings, is_pixel: bool = False) -> SamplerSettings:
    """The annealing loop that the configuration asks for, with what follows from the prior's family."""
    own = follow_family(settings)
    return build_sampler_settings(own.sampler.annealing, own.sampler.ode, resolve_chain(own), own.compat, is_pixel)


def build_plan(
    settings: RunSettings, prior: Prior, operator: Operator, loop: SamplerSettings, device: torch.device
) -> Plan:
    """The plan that the configuration ``settings`` asks for, once it is known that every hook that is on can act.

    Raises:
        SettingsError, PriorError: one cannot, see its ``build``, or there is no such start.
    """
    asked = cut_hooks(settings, settings.num_samples, settings.particle_ids)
    _check_kernel(loop.chain.kernel, operator)
    if settings.sampler.mcmc.covariance == "measured" and loop.covariance is None:
        loop = replace(loop, covariance=measured_covariance(prior, loop.path, loop.space == "pixel", device))
    start = build_start(asked["start"], prior, operator, loop.gate_path)
    setup = Setup(prior, operator, loop.gate_path, asked, device, _first_level(asked, start, loop.gate_path))
    plan = Plan(setup, loop, start, tuple(settings.hooks))
    _ = plan.built, plan.own_hooks
    _check_order(plan)
    return plan


def _check_kernel(kernel: str, operator: Operator) -> None:
    """Kernels that solve a level's target need an operator of their kind."""
    if kernel == "cg" and not operator.linear:
        raise SettingsError(
            f"sampler.mcmc.kernel=cg: draws exactly for linear operators, and {operator.name} is none; use hmc"
        )
    if kernel == "admm" and not isinstance(operator, PhaseRetrieval):
        raise SettingsError(
            f"sampler.mcmc.kernel=admm: splits amplitudes from their phases, and {operator.name} measures none; use "
            f"{'cg' if operator.linear else 'hmc'}"
        )


def _first_level(asked: HooksAsked, start: WarmStart | None, path: torch.Tensor) -> int:
    """The earliest level that runs: that of the start, or of a child that is annealed again."""
    if start is None:
        return 0
    rounds = asked["restart"]
    again = restarts.restart_levels(path, rounds.sigmas) if rounds.rounds > 0 else []
    return min([start.level, *again])


def _check_order(plan: Plan) -> None:
    """Pruning and optimisation must not come before the start."""
    asked, count = plan.setup.asked, plan.setup.num_levels
    at = {"pruning": plan.prune_level}
    if asked["optimization"].when == "every":
        at["optimization"] = plan.optimize_level
    for prefix, level in at.items():
        if plan.warm_start is not None and level is not None and level < plan.warm_start.level:
            first = NUM_TIMESTEPS * (count - plan.warm_start.level) / count
            raise SettingsError(
                f"{prefix}_step={asked[prefix].step}: a run with start={asked['start'].kind}, "
                f"start_sigma={asked['start'].sigma:g} begins later, at t = {first:g}; use {prefix}_step={int(first)} "
                "or less, or a greater start_sigma"
            )
