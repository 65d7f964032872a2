r"""Minimise an objective over latents with AdamW or L-BFGS, each particle on its own.

The objective is either data consistency, :math:`\frac1n |A(D(z)) - y|^2` (ReSample, Song et al. 2024), or beside the
prior the posterior

.. math:: \frac{1}{2 \tau^2} |A(D(z)) - y|^2 - \log p_\sigma(z).

A particle of the first stops when its loss reaches a floor, when it exceeds the loss of ``window`` iterations before,
or after ``max_iters``. A stopped particle is taken out of the batch: it does not move any more and costs nothing. The
score has no potential to watch, and the data loss may rise on the way: the second runs for ``max_iters``, or until the
line integral of its gradient has fallen by less than ``gain`` over :data:`GAIN_ITERATIONS`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from particledaps.diffusion.levels import per_particle
from particledaps.diffusion.score import score
from particledaps.particles.data_term import DataTerm
from particledaps.particles.lbfgs import LBFGS, inner

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior


METHODS = ("adamw", "lbfgs")
GAIN_ITERATIONS = 5


@dataclass(frozen=True)
class DescentSettings:
    """How far and how fast.

    Attributes:
        lr: learning rate of AdamW (ReSample: 5e-3).
        max_iters: iterations at most.
        window: stop when the loss exceeds the loss this many iterations before (ReSample: 200); without prior only.
        weight_decay: decoupled, as AdamW's (ReSample: 1e-2, PyTorch's default).
        prior_sigma: noise level of the prior's score in the objective; 0: data consistency alone.
        tau: standard deviation of the likelihood beside the prior; used with ``prior_sigma`` only.
        method: ``adamw``, or ``lbfgs`` (:mod:`particledaps.particles.lbfgs`), whose first step has the root mean square
            ``lr``, without weight decay.
        gain: beside the prior, a particle stops once it gained less, in nats, over the last few iterations; 0: never.
    """

    lr: float = 5e-3
    max_iters: int = 500
    window: int = 200
    weight_decay: float = 1e-2
    prior_sigma: float = 0.0
    tau: float = 0.05
    method: str = "adamw"
    gain: float = 0.0


@dataclass
class Moments:
    """AdamW's running averages, one row a particle."""

    first: torch.Tensor
    second: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> Moments:
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
        reason: ``floor``, ``plateau``, ``gain``, ``diverged`` (its loss is not finite) or ``max_iters``.
        change: of the objective, ``(P,)``: line integral of its gradient (trapezoidal), if it was asked for.
    """

    z: torch.Tensor
    iterations: torch.Tensor
    reason: list[str]
    change: torch.Tensor


class AdamW:
    """Steps of :func:`adamw_step` of a batch that can lose rows.

    Args:
        z: where it begins.
        settings: learning rate and weight decay.
    """

    def __init__(self, z: torch.Tensor, settings: DescentSettings) -> None:
        self.settings, self.iteration = settings, 0
        self.moments = Moments(torch.zeros_like(z), torch.zeros_like(z))

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self.moments = self.moments[rows]

    def step(self, z: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The next positions."""
        self.iteration += 1
        return adamw_step(z, gradient, self.moments, self.iteration, self.settings.lr, self.settings.weight_decay)


def optimise(
    z: torch.Tensor,
    objective: ParticleObjective,
    floor: torch.Tensor,
    settings: DescentSettings,
    with_change: bool = False,
) -> Outcome:
    """Minimise each particle's objective until it stops.

    Args:
        z: ``(P, ...)`` start.
        objective: data loss and gradient of the objective of some of the particles.
        floor: ``(P,)`` data losses at which to stop.
        settings: see :class:`DescentSettings`.
        with_change: measure the change of the objective, which takes one more evaluation.
    """
    result, reason = z.clone(), ["max_iters"] * len(z)
    taken, change = torch.zeros(len(z), dtype=torch.long, device=z.device), z.new_zeros(len(z))
    rows = torch.arange(len(z), device=z.device)
    stepper = LBFGS(settings.lr) if settings.method == "lbfgs" else AdamW(z, settings)
    last = z.new_zeros(len(z))
    step = torch.zeros_like(z)
    history: deque[torch.Tensor] = deque()
    changes: deque[torch.Tensor] = deque(maxlen=GAIN_ITERATIONS + 1)
    for iteration in range(settings.max_iters):
        loss, gradient = objective(z, rows)
        change[rows] += inner(gradient, step) / 2
        last[rows] = loss
        history.append(last.clone())
        before = history.popleft()[rows] if iteration >= settings.window else None
        stops = stopping(loss, floor[rows], before, settings.prior_sigma > 0)
        changes.append(change.clone())
        if settings.prior_sigma > 0 and settings.gain > 0 and len(changes) > GAIN_ITERATIONS:
            stops["gain"] = (changes.popleft() - change)[rows] < settings.gain
        ended = torch.stack(list(stops.values())).any(0)
        if bool(ended.any()):  # the only wait for the device in an iteration
            for why, particles in stops.items():
                for i in rows[particles].tolist():
                    reason[i] = why
            going = ~ended
            rows = rows[going]
            z = z[going]
            gradient = gradient[going]
            stepper.keep(going)
        if len(rows) == 0:
            break
        moved = stepper.step(z, gradient)
        step, z = moved - z, moved
        change[rows] += inner(gradient, step) / 2
        result[rows] = z
        taken[rows] += 1
    if len(rows) and with_change:
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

    def __init__(self, prior: Prior, operator: Operator, y: torch.Tensor, settings: DescentSettings) -> None:
        self.prior = prior
        self.operator = operator
        self.y = y
        self.settings = settings
        self._count = -1
        self._term: DataTerm | None = None

    def __call__(self, z: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Data losses ``(R,)`` and gradients like ``z`` ``(R, ...)`` of particles ``rows``."""
        settings = self.settings
        if self._term is None or len(rows) != self._count:
            self._count = len(rows)
            self._term = DataTerm(self.prior, self.operator, self.y[rows])
        loss, gradient = self._term.differentiate(z)
        if settings.prior_sigma == 0:
            return loss, gradient / self.y[0].numel()
        with torch.no_grad():
            return loss, gradient / (2 * settings.tau**2) - score(self.prior.denoiser, z, settings.prior_sigma)


def polish(
    z: torch.Tensor, y: torch.Tensor, prior: Prior, operator: Operator, settings: DescentSettings
) -> torch.Tensor:
    """Particles ``z`` ``(P, ...)`` after ``max_iters`` steps beside the prior on all of their ``y``.

    A particle whose loss is not finite any more stays as it was.
    """
    moved = optimise(z, ParticleObjective(prior, operator, y, settings), z.new_zeros(len(z)), settings).z
    fits = operator.loss(prior.decode(moved), y).isfinite()
    return torch.where(per_particle(fits, z), moved, z)
