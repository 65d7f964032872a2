"""What a reconstruction may be told: its hooks in their order, whether they can act, and what they leave behind.

A hook is one module with ``PREFIX`` and ``Settings`` (the user's keys), ``conflicts``, ``build`` and ``record``. The
configuration is cut here, once; nothing else takes it whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

import pruning
import repulsion
import resample_opt
import resampling
import restarts
import symmetry
from operators.operator import Operator
from priors.prior import Prior
from runs import own_hooks, starts
from runs.checks import Checks, SettingsError
from runs.hook_keys import Asked, cut, flat_class
from runs.hook_setup import Setup
from runs.phases import PhaseClock, PhaseHook
from runs.starts import WarmStart, build_start
from state import NUM_TIMESTEPS, Hook, Info

HOOKS = (repulsion, resampling, symmetry, pruning, restarts, resample_opt)
"""In the order in which they are called."""
KEYED = {module.PREFIX: module for module in (*HOOKS, starts)}
HookKeys = flat_class("HookKeys", {prefix: module.Settings for prefix, module in KEYED.items()})
"""The users keys of all hooks and of the start, at the top level of the configuration."""


def cut_hooks(keys: Any, num_samples: int, particle_ids: list[int] | None = None) -> Asked:
    """The settings of each hook."""
    parts = {prefix: cut(prefix, module.Settings, keys) for prefix, module in KEYED.items()}
    return Asked(num_samples, num_samples if particle_ids is None else len(particle_ids), parts)


def check_hooks(keys: Any, num_samples: int, checks: Checks) -> None:
    """Report every value that no hook could run with."""
    checks.problems += cut_hooks(keys, num_samples).problems(KEYED)


def check_own_hooks(asked: list[Any], checks: Checks) -> None:
    """Report every entry of the key ``hooks`` that names no hook."""
    checks.problems += own_hooks.problems(asked)


@dataclass(frozen=True)
class Plan:
    """What is done to the particles beside sampling; makes the hooks of each image.

    Attributes:
        setup: prior, operator, levels and what was asked for.
        warm_start: where the particles begin; None for pure noise.
        own: hooks of the user's own, as the key ``hooks`` names them; called after the others.
    """

    setup: Setup
    warm_start: WarmStart | None = None
    own: tuple[Any, ...] = ()

    def with_prior(self, prior: Prior) -> Plan:
        """The same plan for the same prior with another ``decode_batch``."""
        start = None if self.warm_start is None else replace(self.warm_start, prior=prior)
        return replace(self, setup=replace(self.setup, prior=prior), warm_start=start)

    def for_operator(self, operator: Operator) -> Plan:
        """The same plan for an image with an operator of its own, which knows what was not measured."""
        start = None if self.warm_start is None else replace(self.warm_start, operator=operator)
        return replace(self, setup=replace(self.setup, operator=operator), warm_start=start)

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
        """Standard deviation of the likelihood beside the prior."""
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
        return shipped | {"hooks": own_hooks.record(list(self.own), info)}


def build_plan(settings: Any, prior: Prior, operator: Operator, path: torch.Tensor, device: torch.device) -> Plan:
    """The plan that the configuration ``settings`` asks for, once it is known that every hook that is on can act.

    Raises:
        SettingsError, PriorError: one cannot, see its ``build``, or there is no such start.
    """
    asked = cut_hooks(settings, settings.num_samples, settings.particle_ids)
    start = build_start(asked["start"], prior, operator, path)
    setup = Setup(prior, operator, path, asked, device, _first_level(asked, start, path))
    plan = Plan(setup, start, tuple(settings.hooks))
    _ = plan.built, plan.own_hooks
    _check_order(plan)
    return plan


def _first_level(asked: Asked, start: WarmStart | None, path: torch.Tensor) -> int:
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
