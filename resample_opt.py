r"""Hook: hard data consistency in latent space (ReSample, Song et al. 2024), each particle on its own.

Optimises ``z0_y`` (:mod:`latent_optimization`). Data consistency alone has nothing left to do where the sampler is
strong: its likelihood is sharper than the noise, so its particles already fit y better than the truth does.
``prior_sigma`` adds the prior's score and makes the objective a posterior at the right noise level, whose minimum takes
the noise back out.
"""

import time
from dataclasses import dataclass, replace

import torch

from diffusion.mcmc import per_particle
from latent_optimization import DescentSettings, Outcome, ParticleObjective, optimise
from operators.operator import Operator
from priors.prior import Prior
from state import Hook, Info, State

WHEN = ("end", "every")
ACCEPT = ("split", "floor", "loss", "objective")


@dataclass(frozen=True)
class OptimizationSettings(DescentSettings):
    """When each particle is optimised and what is kept; how is said by :class:`DescentSettings`.

    Attributes:
        from_level: first level with ``t <= optimization_step``.
        when: ``end``: once, after the last level; ``every``: at every level from ``from_level`` on.
        accept: ``split``: optimise on one half of a measurement that holds two independent copies, keep the result if
            the loss on the other half fell; ``floor``: keep it if its loss came nearer to the one expected at the
            answer; ``loss``: keep it if its loss fell (fits noise); ``objective``: keep it if the objective fell, the
            line integral of its gradient (beside the prior it has no value of its own).
        best: at the end, optimise only this many particles, of the lowest data loss, and drop the others; None: all.
        twins: at the end, optimise beside each particle its images under the operator's symmetries too, as particles
            of their own. What was optimised in one orientation is polished for it: the prior can compare twins fairly
            only after both had the same treatment.
    """

    from_level: int = 0
    when: str = "end"
    accept: str = "split"
    best: int | None = None
    twins: bool = False


class LatentOptimization(Hook):
    """Optimises ``z0_y`` at the end or at every late level.

    Args:
        prior: its decoder.
        operator: its loss, and perhaps two independent halves of y.
        settings: how.
        expected: loss expected at the answer, over all of y.
    """

    def __init__(self, prior: Prior, operator: Operator, settings: OptimizationSettings, expected: float) -> None:
        self.prior, self.operator, self.settings, self.expected = prior, operator, settings, expected

    def before_renoise(self, state: State, info: Info) -> State:
        """At every late level, if asked for; children that stand higher up wait for their own turn."""
        settings = self.settings
        if settings.when != "every" or state.step < settings.from_level:
            return state
        return self._apply(state, state.active & (state.level == state.step + 1), info)

    def at_end(self, state: State, info: Info) -> State:
        """After the last level, if asked for."""
        if self.settings.when != "end":
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
        fit_y, held_y, floor = part.y, None, torch.full_like(initial, self.expected)
        if self.settings.accept == "split":
            halves = self.operator.split(part.y)
            if halves is None:
                raise ValueError(f"accept=split: the operator {self.operator.name} cannot split a measurement")
            fit_y, held_y = halves.fit, halves.held
            floor = floor - self.operator.noise_floor(part.y).mean + halves.floor
        objective = ParticleObjective(self.prior, self.operator, fit_y, self.settings)
        outcome = optimise(part.z0_y, objective, floor, self.settings, self.settings.accept == "objective")
        final = self._loss(outcome.z, part.y)
        accepted = self._accept(part.z0_y, outcome, held_y, initial, final)
        z0_y = state.z0_y.clone()
        z0_y[rows] = torch.where(per_particle(accepted, part.z0_y), outcome.z, part.z0_y)
        info.add(
            "optimization",
            step=state.step,
            rule=self.settings.accept,
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

    def _accept(
        self,
        before: torch.Tensor,
        outcome: Outcome,
        held_y: torch.Tensor | None,
        initial: torch.Tensor,
        final: torch.Tensor,
    ) -> torch.Tensor:
        if held_y is not None:
            return self._loss(outcome.z, held_y) < self._loss(before, held_y)
        if self.settings.accept == "objective":
            return (outcome.change < 0) & final.isfinite()
        if self.settings.accept == "loss":
            return final < initial
        return (final - self.expected).abs() < (initial - self.expected).abs()
