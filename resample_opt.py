r"""Hook: hard data consistency in latent space (ReSample, Song et al. 2024), each particle on its own.

Optimises ``z0_y`` (:mod:`particledaps.particles.descent`). Data consistency alone has nothing left to do where the
sampler is strong: its likelihood is sharper than the noise, so its particles already fit y better than the truth does.
``prior_sigma`` adds the prior's score and makes the objective a posterior at the right noise level, whose minimum takes
the noise back out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from particledaps.checks import SettingsError
from particledaps.diffusion.levels import per_particle
from particledaps.particles.data_term import Expected, expected_loss
from particledaps.particles.descent import METHODS, DescentSettings, Outcome, ParticleObjective, optimise
from particledaps.particles.state import Hook, Info, State
from particledaps.settings.hook_keys import HooksAsked, key

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.particles.hook_setup import Setup
    from particledaps.priors.prior import Prior

PREFIX = "optimization"
WHEN = ("end", "every")
ACCEPT = ("split", "floor", "loss", "objective")


@dataclass(frozen=True)
class Settings:
    """When each particle is optimised, how, and what is kept; the keys ``optimization_*``.

    Attributes:
        step: optimise from the first level with ``t <= step`` on (0 to 1000), -1 is off.
        when: ``end``: once, after the last level; ``every``: at every level from there on.
        lr: learning rate of AdamW (ReSample: 5e-3); of ``lbfgs`` the root mean square of its first step.
        max_iters: iterations at most, a level.
        window: stop when the loss exceeds the one this many iterations before (without the prior's score).
        weight_decay: of AdamW.
        prior_sigma: add the prior's score at this sigma to the objective (a posterior instead of data consistency
            alone), 0 is off.
        tau: standard deviation of the likelihood beside the prior; None: the operator's noise.
        accept: ``split``: optimise on one half of a measurement that holds two independent copies, keep the result if
            the loss on the other half fell; ``floor``: keep it if its loss came nearer to the one expected at the
            answer; ``loss``: keep it if its loss fell (fits noise); ``objective``: keep it if the objective fell, the
            line integral of its gradient (beside the prior it has no value of its own); ``auto``: split where the
            operator can (else floor), and objective beside the prior.
        best: at the end, optimise only this many particles, of the lowest data loss, and drop the others; None: all.
        twins: at the end, optimise beside each particle its images under the operator's symmetries too, as particles
            of their own. What was optimised in one orientation is polished for it: the prior can compare twins fairly
            only after both had the same treatment (``selection_rule=plausibility`` or ``posterior``).
        method: ``adamw``; or ``lbfgs``, which beside the prior needs a third of the iterations (no weight decay).
        gain: beside the prior, a particle stops once its objective fell by less, in nats, over five iterations; 0: off.
    """

    step: int = key(-1, low=-1, high=1000)
    when: str = key("end", words=WHEN)
    lr: float = key(5e-3, low=0, open_low=True)
    max_iters: int = key(500, low=0)
    window: int = key(200, low=1)
    weight_decay: float = key(1e-2, low=0)
    prior_sigma: float = key(0.0, low=0)
    tau: float | None = key(None, low=0, open_low=True)
    accept: str = key("auto", words=("auto", *ACCEPT))
    best: int | None = key(None, low=1)
    twins: bool = key(False)
    method: str = key("adamw", words=METHODS, neutral="adamw")
    gain: float = key(0.0, low=0, neutral=0.0)

    def descent(self, tau: float, max_iters: int) -> DescentSettings:
        """How far and how fast, with ``tau`` and so many iterations."""
        of_prior = self.prior_sigma, tau, self.method, self.gain
        return DescentSettings(self.lr, max_iters, self.window, self.weight_decay, *of_prior)


def conflicts(settings: Settings, asked: HooksAsked) -> Iterator[str]:
    """Sentences on values that exclude each other."""
    if settings.twins and settings.when != "end":
        yield "optimization_twins: twins are added with optimization_when=end only"
    if settings.best is not None and settings.when != "end":
        yield "optimization_best: particles are dropped with optimization_when=end only"
    if settings.prior_sigma > 0 and settings.accept == "split":
        yield (
            "optimization_accept=split: a posterior (optimization_prior_sigma > 0) needs all of the measurement; "
            "use auto"
        )
    if settings.prior_sigma == 0 and (settings.gain > 0 or settings.method == "lbfgs"):
        yield (
            f"optimization_method={settings.method}, optimization_gain={settings.gain:g}: they act beside the prior; "
            "set optimization_prior_sigma > 0"
        )
    for name, wanted in (("twins", settings.twins), ("best", settings.best is not None)):
        if wanted and settings.step < 0:
            yield f"optimization_{name}: the optimisation is off; it needs optimization_step of at least 0"
    pruned = asked["pruning"].step
    if 0 <= pruned < settings.step:
        yield (f"optimization_step={settings.step}: must not exceed pruning_step={pruned} (pruning comes first)")


def first_level(settings: Settings, setup: Setup) -> int | None:
    """First level that may be optimised (``K`` where none is late enough: only the end is); None if it is off."""
    found = setup.level_at(settings.step)
    return setup.num_levels if found is None and settings.step >= 0 else found


def build(settings: Settings, setup: Setup) -> LatentOptimization | None:
    """The hook; None if it is off.

    Raises:
        SettingsError: the operator cannot split a measurement.
    """
    level = first_level(settings, setup)
    if level is None:
        return None
    if settings.accept == "split" and not setup.operator.can_split:
        raise SettingsError(
            f"optimization_accept=split: the operator {setup.operator.name} has no two independent copies of its "
            "measurement; use optimization_accept=auto"
        )
    at_end = settings.when == "end" or level == setup.num_levels
    return LatentOptimization(setup.prior, setup.operator, settings, None if at_end else level)


def record(settings: Settings, hook: LatentOptimization | None, info: Info, particle_ids: list[int]) -> dict[str, Any]:
    """Totals of each particle over all levels, in the order of ``particle_ids``; None if nothing was optimised."""
    rows = info.rows.get("optimization", [])
    if not rows:
        return {"optimization": None}
    calls = [[(row, row["particle_ids"].index(p)) for row in rows if p in row["particle_ids"]] for p in particle_ids]

    def of(name: str, call: int) -> list[Any]:
        return [own[call][0][name][own[call][1]] if own else None for own in calls]

    facts = {
        "particle_ids": particle_ids,
        "iterations": [sum(row["iterations"][i] for row, i in own) for own in calls],
        "seconds": sum(row["seconds"] for row in rows),
        "initial_loss": of("initial_loss", 0),
        "final_loss": of("final_loss", -1),
        "reason": of("reason", -1),
        "accepted": [any(row["accepted"][i] for row, i in own) for own in calls],
        "twins": info.rows.get("twins", []),
        "per_step": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
    }
    return {"optimization": facts}


class LatentOptimization(Hook):
    """Optimises ``z0_y`` at the end or at every late level.

    Args:
        prior: its decoder.
        operator: its loss, and perhaps two independent halves of y.
        settings: how.
        from_level: first level of ``every``; None: once, at the end.
        expected: gives the loss that is expected at the answer to a measurement, over all of it.
    """

    def __init__(
        self,
        prior: Prior,
        operator: Operator,
        settings: Settings,
        from_level: int | None = None,
        expected: Callable[[Prior, Operator, torch.Tensor], Expected] = expected_loss,
    ) -> None:
        self.prior = prior
        self.operator = operator
        self.settings = settings
        self.expected = expected
        self.from_level = from_level
        self.descent = settings.descent(
            operator.noise_sigma if settings.tau is None else settings.tau, settings.max_iters
        )

    @property
    def accept(self) -> str:
        """The rule; one of :data:`ACCEPT`."""
        if self.settings.accept != "auto":
            return self.settings.accept
        if self.settings.prior_sigma > 0:
            return "objective"
        return "split" if self.operator.can_split else "floor"

    def before_renoise(self, state: State, info: Info) -> State:
        """At every late level, if asked for; children that stand higher up wait for their own turn."""
        if self.from_level is None or state.step < self.from_level:
            return state
        return self._apply(state, state.active & (state.level == state.step + 1), info)

    def at_end(self, state: State, info: Info) -> State:
        """After the last level, if asked for."""
        if self.from_level is not None:
            return state
        state = self._keep_best(state)
        if self.settings.twins and self.settings.max_iters > 0:
            state = self._add_twins(state, info)
        return self._apply(state, state.active, info)

    def _keep_best(self, state: State) -> State:
        """The particles worth optimising; diverged ones stay, to be reported."""
        best = self.settings.best
        if best is None or int(state.active.sum()) <= best:
            return state
        kept = state.diverged.clone()
        kept[state.lowest(self._loss(state.z0_y, state.y), best)] = True
        return state[kept]

    def _add_twins(self, state: State, info: Info) -> State:
        """These particles, then those of each symmetry but the identity, encoded, under new ids."""
        parents = state.active.nonzero().flatten().tolist()
        for symmetry in self.operator.symmetries()[1:]:
            if not parents:
                break
            turned = self.prior.encode(symmetry.apply(self.prior.decode(state.z0_y[parents])).clamp(-1, 1))
            twins = state.children(parents, z0_y=turned, z0_hat=turned)
            for birth in twins.births:
                info.add("twins", **birth)
            state = state.join(twins)
        return state

    def _apply(self, state: State, chosen: torch.Tensor, info: Info) -> State:
        rows = torch.nonzero(chosen).flatten()
        if len(rows) == 0 or self.settings.max_iters == 0:
            return state
        started, part = time.perf_counter(), state[rows]
        initial = self._loss(part.z0_y, part.y)
        expected = self.expected(self.prior, self.operator, state.y[:1]).mean
        fit_y = part.y
        held_y = None
        floor = torch.full_like(initial, expected)
        if self.accept == "split":
            halves = self.operator.split(part.y)
            if halves is None:
                raise ValueError(f"accept=split: the operator {self.operator.name} cannot split a measurement")
            fit_y, held_y = halves.fit, halves.held
            floor = floor - self.operator.noise_floor(part.y).mean + halves.floor
        objective = ParticleObjective(self.prior, self.operator, fit_y, self.descent)
        outcome = optimise(part.z0_y, objective, floor, self.descent, self.accept == "objective")
        final = self._loss(outcome.z, part.y)
        accepted = self._accepted(part.z0_y, outcome, held_y, (initial, final), expected)
        z0_y = state.z0_y.clone()
        z0_y[rows] = torch.where(per_particle(accepted, part.z0_y), outcome.z, part.z0_y)
        info.add(
            "optimization",
            step=state.step,
            rule=self.accept,
            particle_ids=part.ids,
            iterations=outcome.iterations.tolist(),
            seconds=time.perf_counter() - started,
            initial_loss=initial.tolist(),
            final_loss=torch.where(accepted, final, initial).tolist(),
            reason=outcome.reason,
            accepted=accepted.tolist(),
        )
        return replace(state, z0_y=z0_y)

    def _loss(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.operator.loss(self.prior.decode(z), y)

    def _accepted(
        self,
        before: torch.Tensor,
        outcome: Outcome,
        held_y: torch.Tensor | None,
        losses: tuple[torch.Tensor, torch.Tensor],
        expected: float,
    ) -> torch.Tensor:
        """Whose result is kept ``(P,)``; ``losses`` before and after."""
        initial, final = losses
        if held_y is not None:
            return self._loss(outcome.z, held_y) < self._loss(before, held_y)
        if self.accept == "objective":
            return (outcome.change < 0) & final.isfinite()
        if self.accept == "loss":
            return final < initial
        return (final - expected).abs() < (initial - expected).abs()
