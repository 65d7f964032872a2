r"""Hook: hard data consistency in latent space (ReSample, Song et al. 2024), each particle on its own.

Minimises :math:`\frac1n |A(D(z)) - y|^2` over ``z`` with AdamW, started from ``z0_y``. A particle stops when its loss
reaches the loss expected at the answer (the noise floor plus what the decoder cannot represent), when it exceeds the
loss of ``window`` iterations before, or after ``max_iters``. A stopped particle is taken out of the batch: it does
not move any more and costs nothing.

Data consistency alone has nothing left to do where the sampler is strong: its likelihood is sharper than the noise,
so its particles already fit y better than the truth does. ``prior_sigma`` adds the prior's score and makes the
objective a posterior at the right noise level,

.. math:: \frac{1}{2 \tau^2} |A(D(z)) - y|^2 - \log p_\sigma(z),

whose minimum takes the noise back out. The score has no potential to watch, and the data loss may rise on the way:
this objective runs for ``max_iters``.
"""

import time
from collections import deque
from dataclasses import dataclass, replace

import torch

from data_term import DataTerm
from diffusion.denoiser import score
from diffusion.mcmc import per_particle
from operators.operator import Operator
from priors.prior import Prior
from sampler import Hook, Info, State

WHEN = ("end", "every")
ACCEPT = ("split", "floor", "loss", "objective")


@dataclass(frozen=True)
class OptimizationSettings:
    """How each particle is optimised.

    Attributes:
        from_level: first level with ``t <= optimization_step``.
        when: ``end``: once, after the last level; ``every``: at every level from ``from_level`` on.
        lr: learning rate of AdamW (ReSample: 5e-3).
        max_iters: iterations at most, a level.
        window: stop when the loss exceeds the loss this many iterations before (ReSample: 200); without prior only.
        weight_decay: decoupled, as AdamW's (ReSample: 1e-2, PyTorch's default).
        prior_sigma: noise level of the prior's score in the objective; 0: data consistency alone.
        tau: standard deviation of the likelihood beside the prior; used with ``prior_sigma`` only.
        accept: ``split``: optimise on one half of a measurement that holds two independent copies, keep the result if
            the loss on the other half fell; ``floor``: keep it if its loss came nearer to the one expected at the
            answer; ``loss``: keep it if its loss fell (fits noise); ``objective``: keep it if the objective fell, the
            line integral of its gradient (beside the prior it has no value of its own).
        best: at the end, optimise only this many particles, of the lowest data loss, and drop the others; None: all.
        twins: at the end, optimise beside each particle its images under the operator's symmetries too, as particles
            of their own. What was optimised in one orientation is polished for it: the prior can compare twins fairly
            only after both had the same treatment.
    """

    from_level: int
    when: str = "end"
    lr: float = 5e-3
    max_iters: int = 500
    window: int = 200
    weight_decay: float = 1e-2
    prior_sigma: float = 0.0
    tau: float = 0.05
    accept: str = "split"
    best: int | None = None
    twins: bool = False


@dataclass
class Moments:
    """AdamW's running averages, one row a particle."""

    first: torch.Tensor
    second: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> "Moments":
        return Moments(self.first[rows], self.second[rows])


def adamw_step(
    z: torch.Tensor,
    gradient: torch.Tensor,
    moments: Moments,
    iteration: int,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.Tensor:
    """One step of AdamW (Loshchilov and Hutter 2019) as ``torch.optim.AdamW`` does it, on rows that can be dropped.

    Args:
        z: ``(P, ...)`` positions.
        gradient: like ``z``.
        moments: updated in place.
        iteration: 1 for the first.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        betas: decay of the two averages.
        eps: added to the root of the second.
    """
    moments.first.lerp_(gradient, 1 - betas[0])
    moments.second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    corrected = moments.second.sqrt() / (1 - betas[1] ** iteration) ** 0.5 + eps
    return z * (1 - lr * weight_decay) - lr / (1 - betas[0] ** iteration) * moments.first / corrected


@dataclass
class Outcome:
    """Results of one call, one row a particle.

    Attributes:
        z: where each particle stopped.
        iterations: steps taken, ``(P,)``.
        reason: ``floor``, ``plateau``, ``diverged`` (its loss is not finite) or ``max_iters``.
        change: of the objective, ``(P,)``: line integral of its gradient (trapezoidal).
    """

    z: torch.Tensor
    iterations: torch.Tensor
    reason: list[str]
    change: torch.Tensor


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product of each particle's rows, ``(P,)``."""
    return (a * b).flatten(1).sum(1)


def optimise(
    z: torch.Tensor, objective: "ParticleObjective", floor: torch.Tensor, settings: OptimizationSettings
) -> Outcome:
    """Minimise each particle's objective until it stops.

    Args:
        z: ``(P, ...)`` start.
        objective: data loss and gradient of the objective of some of the particles.
        floor: ``(P,)`` data losses at which to stop.
        settings: see :class:`OptimizationSettings`.
    """
    result, reason = z.clone(), ["max_iters"] * len(z)
    taken, change = torch.zeros(len(z), dtype=torch.long, device=z.device), z.new_zeros(len(z))
    rows, moments = torch.arange(len(z), device=z.device), Moments(torch.zeros_like(z), torch.zeros_like(z))
    last, step, history = z.new_zeros(len(z)), torch.zeros_like(z), deque()
    for iteration in range(settings.max_iters):
        loss, gradient = objective(z, rows)
        change[rows] += inner(gradient, step) / 2
        last[rows] = loss
        history.append(last.clone())
        before = history.popleft()[rows] if iteration >= settings.window else None
        stops = stopping(loss, floor[rows], before, settings.prior_sigma > 0)
        for why, particles in stops.items():
            for i in rows[particles].tolist():
                reason[i] = why
        going = ~torch.stack(list(stops.values())).any(0)
        if not bool(going.all()):
            rows, z, gradient, moments = rows[going], z[going], gradient[going], moments[going]
        if len(rows) == 0:
            break
        moved = adamw_step(z, gradient, moments, iteration + 1, settings.lr, settings.weight_decay)
        step, z = moved - z, moved
        change[rows] += inner(gradient, step) / 2
        result[rows] = z
        taken[rows] += 1
    if len(rows) and settings.accept == "objective":
        change[rows] += inner(objective(z, rows)[1], step) / 2
    return Outcome(result, taken, reason, change)


def stopping(
    loss: torch.Tensor, floor: torch.Tensor, before: torch.Tensor | None, with_prior: bool
) -> dict[str, torch.Tensor]:
    """Which particles stop now, by reason; ``before`` is their loss one window earlier, None before that."""
    stops = {"diverged": ~loss.isfinite()}
    if not with_prior:
        stops["floor"] = loss <= floor
        if before is not None:
            stops["plateau"] = (loss > before) & ~stops["floor"]
    return stops


class ParticleObjective:
    """Data loss and gradient of the objective of a subset of the particles, which only ever becomes smaller.

    Args:
        prior: decoder, and denoiser for the score.
        operator: the loss.
        y: ``(P, ...)`` one measurement a particle.
        settings: with or without the prior's score.
    """

    def __init__(self, prior: Prior, operator: Operator, y: torch.Tensor, settings: OptimizationSettings) -> None:
        self.prior, self.operator, self.y, self.settings = prior, operator, y, settings
        self._count, self._term = -1, None

    def __call__(self, z: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Data losses ``(R,)`` and gradients like ``z`` ``(R, ...)`` of particles ``rows``."""
        settings = self.settings
        if len(rows) != self._count:
            self._count = len(rows)
            self._term = DataTerm(self.prior, self.operator, self.y[rows])
        loss, gradient = self._term(z, True)
        if settings.prior_sigma == 0:
            return loss, gradient / self.y[0].numel()
        with torch.no_grad():
            return loss, gradient / (2 * settings.tau**2) - score(self.prior.denoiser, z, settings.prior_sigma)


def polish(
    z: torch.Tensor, y: torch.Tensor, prior: Prior, operator: Operator, settings: OptimizationSettings
) -> torch.Tensor:
    """Particles ``z`` ``(P, ...)`` after ``max_iters`` steps beside the prior on all of their ``y``.

    A particle whose loss is not finite any more stays as it was.
    """
    moved = optimise(z, ParticleObjective(prior, operator, y, settings), z.new_zeros(len(z)), settings).z
    fits = operator.loss(prior.decode(moved), y).isfinite()
    return torch.where(per_particle(fits, z), moved, z)


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
            for parent, child in zip(twins.parent_id.tolist(), twins.ids, strict=True):
                info.add("twins", parent=parent, child=child)
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
        outcome = optimise(part.z0_y, objective, floor, self.settings)
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
