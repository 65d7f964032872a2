"""The hooks of one run: which are on, and in what order they are called."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from evaluation.modes import agreement_db
from evaluation.orientation import latent_plausibility, posterior_energy
from latent_optimization import DescentSettings, polish
from operators.operator import Operator
from priors.prior import Prior
from pruning import Pruning, PruningSettings
from repulsion import FeatureSpace, Repulsion, RepulsionSettings
from resample_opt import LatentOptimization, OptimizationSettings
from resampling import Resampling, ResamplingSettings
from restarts import Restarts, RestartSettings
from runs.feature_space import build_feature_space
from runs.hook_settings import HookKeys
from runs.phases import PhaseClock, PhaseHook
from runs.plan_checks import check_plan
from runs.rng import SHARED
from runs.settings import RunSettings
from runs.starts import WarmStart, build_start
from state import NUM_TIMESTEPS, Hook
from symmetry import SymmetryMoves, SymmetrySettings


def level_of(step: int, num_levels: int) -> int | None:
    """The first level k of K with ``t = 1000 (1 - k / K) <= step``, compared in integers; None if off or never."""
    if step < 0:
        return None
    reached = (k for k in range(num_levels) if NUM_TIMESTEPS * (num_levels - k) <= step * num_levels)
    return next(reached, None)


@dataclass(frozen=True)
class HookPlan:
    """What ``posterior_sample.py`` was asked to do at each level; makes fresh hooks for each image.

    Attributes:
        keys: the configuration.
        prior: the prior.
        operator: the operator.
        path: annealing sigmas ``(K + 1,)``.
        num_samples: particles at the start.
        space: where repulsion measures distances; None if it is off.
        warm_start: where the particles begin; None for pure noise.
    """

    keys: HookKeys
    prior: Prior
    operator: Operator
    path: torch.Tensor
    num_samples: int
    space: FeatureSpace | None = None
    warm_start: WarmStart | None = None

    def with_prior(self, prior: Prior) -> "HookPlan":
        """The same plan for the same prior with another ``decode_batch``."""
        start = None if self.warm_start is None else replace(self.warm_start, prior=prior)
        return replace(self, prior=prior, warm_start=start)

    @property
    def prune_level(self) -> int | None:
        """Level at whose end particles are pruned."""
        return level_of(self.keys.pruning_step, len(self.path) - 1)

    @property
    def optimize_level(self) -> int | None:
        """First level at which latents may be optimised (``K`` where no level is late enough: only the end is)."""
        if self.keys.optimization_step < 0:
            return None
        found = level_of(self.keys.optimization_step, len(self.path) - 1)
        return len(self.path) - 1 if found is None else found

    @property
    def phases(self) -> list[str]:
        """Names of the phases, in order."""
        prunes, optimises = self.prune_level is not None, self.optimize_level is not None
        if prunes and optimises:
            return ["pre_pruning", "post_pruning_pre_optimization", "optimization"]
        if prunes:
            return ["pre_pruning", "post_pruning"]
        return ["pre_optimization", "optimization"] if optimises else ["sampling"]

    def hooks(self, y: torch.Tensor, clock: PhaseClock) -> list[Hook]:
        """Hooks for one measurement ``y`` ``(1, ...)``, with the phase changes between them."""
        keys, hooks = self.keys, []
        floor = self.operator.noise_floor(y)
        excess, spread = (self.prior.misfit_excess or {}).get(self.operator.name, (0.0, 0.0))
        expected = floor.mean.item() + excess
        if self.space is not None:
            hooks.append(Repulsion(self.prior, self.space, self._repulsion_settings(), self.path))
        if keys.resample_sigma > 0:
            hooks.append(Resampling(self.resampling_settings))
        if keys.symmetry_moves:
            hooks.append(SymmetryMoves(self.prior, self.operator, self.symmetry_settings))
        if self.prune_level is not None:
            loss_std = (floor.std.item() ** 2 + spread**2) ** 0.5
            pruning = self._pruning_settings()
            hooks.append(Pruning(self.prior, self.operator, pruning, self.path, expected, loss_std))
            hooks.append(PhaseHook(clock, self.phases[1], self.prune_level))
        if keys.restart_rounds > 0:
            settings, energy = self._restart_settings(), self._energy if keys.restart_rule == "posterior" else None
            agree = partial(agreement_db, symmetries=self.operator.symmetries()) if settings.lineages > 1 else None
            hooks.append(Restarts(self.prior, self.operator, settings, self.path, self._polish(), energy, agree))
        if self.optimize_level is not None:
            at_end = keys.optimization_when == "end" or self.optimize_level == len(self.path) - 1
            if self.optimize_level == self.prune_level and not at_end:
                hooks.pop()  # nothing lies between pruning and optimisation
                clock.skip(self.phases[1])
            hooks.append(PhaseHook(clock, self.phases[-1], None if at_end else self.optimize_level))
            settings = OptimizationSettings(
                **asdict(self._descent(keys.optimization_max_iters)),
                from_level=self.optimize_level,
                when="end" if at_end else "every",
                accept=self._accept_rule(),
                best=keys.optimization_best,
                twins=keys.optimization_twins,
            )
            hooks.append(LatentOptimization(self.prior, self.operator, settings, expected))
        return hooks

    def _descent(self, max_iters: int) -> DescentSettings:
        keys = self.keys
        return DescentSettings(
            lr=keys.optimization_lr,
            max_iters=max_iters,
            window=keys.optimization_window,
            weight_decay=keys.optimization_weight_decay,
            prior_sigma=keys.optimization_prior_sigma,
            tau=self.optimization_tau,
        )

    @property
    def optimization_tau(self) -> float:
        """Standard deviation of the likelihood beside the prior."""
        return self.operator.noise_sigma if self.keys.optimization_tau is None else self.keys.optimization_tau

    def _energy(self, z: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return posterior_energy(self.prior, latent_plausibility(self.prior, z), loss, self.optimization_tau)

    def _polish(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        if self.keys.restart_polish == 0:
            return None
        settings = self._descent(self.keys.restart_polish)
        return partial(polish, prior=self.prior, operator=self.operator, settings=settings)

    def _accept_rule(self) -> str:
        if self.keys.optimization_accept != "auto":
            return self.keys.optimization_accept
        if self.keys.optimization_prior_sigma > 0:
            return "objective"
        return "split" if self.operator.can_split else "floor"

    def _repulsion_settings(self) -> RepulsionSettings:
        keys = self.keys
        return RepulsionSettings(
            scale=keys.repulsion_scale,
            unit=keys.repulsion_unit,
            sigma_break=keys.repulsion_sigma_break,
            schedule=keys.repulsion_schedule,
            estimate=keys.repulsion_on,
            stop_at=keys.optimization_step,
            log=keys.repulsion_log,
        )

    @property
    def symmetry_settings(self) -> SymmetrySettings:
        """Which moves, when and how."""
        keys = self.keys
        return SymmetrySettings(
            moves=tuple(keys.symmetry_moves),
            sigma_max=keys.symmetry_sigma_max,
            sigma_min=keys.symmetry_sigma_min,
            window_sigma=keys.symmetry_window_sigma,
            every=keys.symmetry_every,
            margin=keys.symmetry_margin,
            loss_tolerance=keys.symmetry_loss_tolerance,
            draws=keys.symmetry_draws,
            tau=self.operator.noise_sigma if keys.symmetry_tau is None else keys.symmetry_tau,
            crossover_ratio=keys.symmetry_crossover_ratio,
        )

    @property
    def resampling_settings(self) -> ResamplingSettings:
        """When and how copies are made."""
        return ResamplingSettings(
            sigma_max=self.keys.resample_sigma,
            sigma_min=self.keys.resample_sigma_min,
            noise_sigma=self.operator.noise_sigma,
            last_level=len(self.path) - 2,
            from_level=0 if self.prune_level is None else self.prune_level + 1,
            stream_id=SHARED,
        )

    def _pruning_settings(self) -> PruningSettings:
        keys = self.keys
        return PruningSettings(
            at_level=self.prune_level,
            keep=keys.pruning_keep,
            rule=keys.pruning_rule,
            mode=keys.pruning_mode,
            tolerance=keys.pruning_tolerance,
            close=keys.pruning_close,
            branch_sigma=keys.pruning_branch,
        )

    def _restart_settings(self) -> RestartSettings:
        keys = self.keys
        return RestartSettings(
            rounds=keys.restart_rounds,
            keep=keys.restart_keep,
            children=keys.restart_children,
            sigmas=tuple(keys.restart_sigmas),
            mcmc_steps=keys.restart_steps,
            conjugated=keys.restart_conjugate,
            lineages=keys.restart_lineages,
            agreement=keys.restart_agreement,
            refinements=keys.restart_refinements,
            first_child_id=2 * self.num_samples,  # the streams of the measurements in PROJECT.md
        )


def build_hook_plan(
    settings: RunSettings, prior: Prior, operator: Operator, path: torch.Tensor, device: torch.device
) -> HookPlan:
    """The plan that the configuration asks for; loads the feature network where one is needed.

    Raises:
        SettingsError, PriorError: see :func:`runs.plan_checks.check_plan`, :func:`build_feature_space` and
            :func:`runs.starts.build_start`.
    """
    warm_start = build_start(settings, prior, operator, path)
    several = (settings.num_samples if settings.particle_ids is None else len(settings.particle_ids)) > 1
    needed = several and (settings.repulsion_scale > 0 or settings.repulsion_log)
    space = build_feature_space(settings, prior, operator, device) if needed else None
    plan = HookPlan(settings, prior, operator, path, settings.num_samples, space, warm_start)
    check_plan(plan)
    return plan
