"""How the particles of a measurement are sampled: the hooks in their order, whether they can act, what they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

import resample_opt
import restarts
from particledaps.checks import SettingsError
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.particles import own_hooks
from particledaps.particles.clean_estimate import measured_covariance
from particledaps.particles.hook_setup import Setup
from particledaps.particles.starts import WarmStart, build_start
from particledaps.particles.state import NUM_TIMESTEPS, Hook, Info, Start
from particledaps.runs.clock import PhaseClock, PhaseHook
from particledaps.settings.hook_keys import HooksAsked
from sampler import LatentDAPS, SamplerSettings, build_sampler_settings

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior
    from particledaps.streams import ParticleStreams
from run_settings import HOOKS, RunSettings, cut_hooks, follow_family, resolve_chain


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
