"""What a plan of hooks asks for against the levels and the operator that it has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from operators.operator import Operator
from restarts import restart_levels
from runs.checks import SettingsError
from state import NUM_TIMESTEPS
from symmetry import NEEDED_SYMMETRY

if TYPE_CHECKING:
    from runs.hooks import HookPlan


def check_plan(plan: HookPlan) -> None:
    """Can every hook that is on act at all?

    Raises:
        SettingsError: the operator lacks what a hook needs, or a hook has no level, or only levels before the start.
    """
    _check_symmetry_moves(plan)
    _check_restarts(plan)
    _check_order(plan)
    _check_repulsion(plan)
    _check_resampling(plan)
    _check_split(plan)


def _first_level(plan: HookPlan) -> int:
    """The earliest level that runs: that of the start, or of a child that is annealed again."""
    if plan.warm_start is None:
        return 0
    again = restart_levels(plan.path, plan.keys.restart_sigmas) if plan.keys.restart_rounds > 0 else []
    return min([plan.warm_start.level, *again])


def _check_symmetry_moves(plan: HookPlan) -> None:
    moves, operator, settings = plan.keys.symmetry_moves, plan.operator, plan.symmetry_settings
    if moves:
        _need_flip(operator, f"symmetry_moves=[{','.join(moves)}]", "symmetry_moves=[]")
    sigmas, first = plan.path[:-1].tolist(), _first_level(plan)
    made = {move for k in range(first, len(sigmas)) for move in settings.moves_at(k, sigmas[k])}
    for move in moves:
        if move not in made:
            band = (
                f"of at least symmetry_window_sigma={settings.window_sigma:g}"
                if move == "window"
                else f"from symmetry_sigma_min={settings.sigma_min:g} to symmetry_sigma_max={settings.sigma_max:g}"
            )
            raise SettingsError(
                f"symmetry_moves: {move} has no level: no sigma {band} at every {settings.every}th of "
                f"{len(sigmas) - first} levels from sigma = {sigmas[first]:g}; lower symmetry_every or widen the range"
            )


def _check_restarts(plan: HookPlan) -> None:
    keys = plan.keys
    if keys.restart_rounds > 0 and keys.restart_conjugate > 0:
        _need_flip(plan.operator, f"restart_conjugate={keys.restart_conjugate}", "restart_conjugate=0")


def _need_flip(operator: Operator, asked: str, instead: str) -> None:
    if NEEDED_SYMMETRY not in [s.name for s in operator.symmetries()]:
        raise SettingsError(
            f"{asked}: the 180-degree flip is no symmetry of the operator {operator.name}; use {instead}"
        )


def _check_order(plan: HookPlan) -> None:
    keys, last = plan.keys, len(plan.path) - 2
    at = {"pruning_step": plan.prune_level}
    if keys.optimization_when == "every":
        at["optimization_step"] = plan.optimize_level
    for key, level in at.items():
        if plan.warm_start is not None and level is not None and level < plan.warm_start.level:
            first = NUM_TIMESTEPS * (last + 1 - plan.warm_start.level) / (last + 1)
            raise SettingsError(
                f"{key}={getattr(keys, key)}: a run with start={keys.start}, start_sigma={keys.start_sigma:g} begins "
                f"later, at t = {first:g}; use {key}={int(first)} or less, or a greater start_sigma"
            )


def _check_repulsion(plan: HookPlan) -> None:
    keys, highest = plan.keys, plan.path[_first_level(plan)].item()
    if plan.space is not None and keys.repulsion_scale > 0 and highest <= keys.repulsion_sigma_break:
        raise SettingsError(
            f"repulsion_sigma_break={keys.repulsion_sigma_break:g}: particles repel above that sigma, and this run "
            f"begins at sigma = {highest:g}; lower it, or use repulsion_scale=0"
        )


def _check_resampling(plan: HookPlan) -> None:
    if plan.keys.resample_sigma <= 0:
        return
    window, sigmas = plan.resampling_settings, plan.path[:-1].tolist()
    levels = range(max(window.from_level, _first_level(plan)), window.last_level)
    if not any(window.sigma_min <= sigmas[k] <= window.sigma_max for k in levels):
        raise SettingsError(
            f"resample_sigma={window.sigma_max:g}, resample_sigma_min={window.sigma_min:g}: no level lies there, after "
            f"pruning and before the last one (sigma = {sigmas[-1]:g}); widen the range"
        )


def _check_split(plan: HookPlan) -> None:
    asked = plan.keys.optimization_accept == "split" and plan.keys.optimization_step >= 0
    if asked and not plan.operator.can_split:
        raise SettingsError(
            f"optimization_accept=split: the operator {plan.operator.name} has no two independent copies of its "
            "measurement; use optimization_accept=auto"
        )
