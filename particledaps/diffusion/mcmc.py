r"""MCMC kernels on a batch of particles and the chain that runs them.

A :data:`Target` gives the potential :math:`U = -\log p` (up to a constant) and its gradient. Kernels are pure
functions of positions, gradients and given noise; they sample :math:`p \propto e^{-U}` as their step size goes to 0
(Langevin, HMC) or exactly (Metropolis-Hastings).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from particledaps.diffusion.levels import per_particle
from particledaps.diffusion.split_steps import crank_nicolson_step, rotation_step

KERNELS = ("langevin", "hmc", "mh")


class Evaluation(NamedTuple):
    """A target at one position: ``potential`` ``(P,)``, ``gradient`` like the position or None, ``loss`` ``(P,)``."""

    potential: torch.Tensor
    gradient: torch.Tensor | None
    loss: torch.Tensor


Target = Callable[["torch.Tensor", bool], Evaluation]
"""``target(x, with_gradient) -> Evaluation``."""

Draw = Callable[[], "torch.Tensor"]
"""Standard normal noise, shaped like the positions, one call after the other."""


@dataclass(frozen=True)
class ChainSettings:
    r"""How one chain runs.

    Attributes:
        kernel: ``langevin`` (unadjusted), ``hmc`` (the under-damped form of DAPS) or ``mh`` (random walk).
        num_steps: gradient evaluations (two target evaluations a step for none of them).
        step_size: :math:`\eta`.
        momentum: ``m`` in [0, 1) of ``hmc``; 0 is Langevin.
        curvature_limit: if set, the step size of each particle is lowered to ``curvature_limit / Lambda`` with
            ``Lambda`` an estimate of the largest curvature of U along the gradient (stable below 2 for Langevin).
    """

    kernel: str = "langevin"
    num_steps: int = 100
    step_size: float = 1e-4
    momentum: float = 0.0
    curvature_limit: float | None = None


def langevin_step(
    x: torch.Tensor, gradient: torch.Tensor, step_size: torch.Tensor | float, noise: torch.Tensor
) -> torch.Tensor:
    r"""Unadjusted Langevin: :math:`x \leftarrow x - \eta \nabla U + \sqrt{2 \eta} \, \epsilon`."""
    step = per_particle(step_size, x)
    return x - step * gradient + (2 * step) ** 0.5 * noise


def hmc_step(
    x: torch.Tensor,
    velocity: torch.Tensor,
    gradient: torch.Tensor,
    step_size: torch.Tensor | float,
    momentum: float,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Under-damped Langevin as DAPS writes it (its ``hmc``).

    .. math:: v \leftarrow m v - h \nabla U + \sqrt{2 (1 - m)} \, \epsilon, \qquad x \leftarrow x + h v,
        \qquad h = \sqrt{\eta}

    ``m = 0`` is :func:`langevin_step`; over many steps it moves like Langevin with step :math:`\eta / (1 - m)`.
    """
    h = per_particle(step_size, x) ** 0.5
    velocity = momentum * velocity - h * gradient + math.sqrt(2 * (1 - momentum)) * noise
    return x + h * velocity, velocity


def metropolis_step(
    x: torch.Tensor,
    current: Evaluation,
    target: Target,
    step_size: torch.Tensor | float,
    noise: torch.Tensor,
    uniform: torch.Tensor,
) -> tuple[torch.Tensor, Evaluation]:
    r"""Random-walk Metropolis: propose :math:`x + \sqrt{\eta} \epsilon`, accept with :math:`\min(1, e^{U - U'})`.

    Args:
        uniform: ``(P,)`` uniform draws that decide. A proposal with a non-finite potential is refused.
    """
    proposal = x + per_particle(step_size, x) ** 0.5 * noise
    proposed = target(proposal, False)
    accept = proposed.potential.isfinite() & (uniform.log() < current.potential - proposed.potential)
    kept = Evaluation(
        torch.where(accept, proposed.potential, current.potential),
        None,
        torch.where(accept, proposed.loss, current.loss),
    )
    return torch.where(per_particle(accept, x), proposal, x), kept


def curvature_along(x: torch.Tensor, gradient: torch.Tensor, target: Target, distance: float = 1e-2) -> torch.Tensor:
    r"""Curvature of U along its gradient, ``(P,)``.

    :math:`|\nabla U(x + d u) - \nabla U(x)| / d` with the unit gradient ``u``: one target evaluation. Gradients point
    along the stiffest directions of U.
    """
    norm = gradient.flatten(1).norm(dim=1)
    unit = gradient / per_particle(norm.clamp(min=1e-30), x)
    ahead, _ = evaluate(target, x + distance * unit)
    return (ahead - gradient).flatten(1).norm(dim=1) / distance


def evaluate(target: Target, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of U and data loss at ``x``.

    Raises:
        ValueError: the target has no gradient.
    """
    _, gradient, loss = target(x, True)
    if gradient is None:
        raise ValueError("this kernel needs a gradient, and the target gives none")
    return gradient, loss


def with_gaussian(target: Target, variance: torch.Tensor) -> Target:
    """The potential, without a gradient, of a target times a Gaussian of ``variance`` about 0."""

    def product(x: torch.Tensor, with_gradient: bool) -> Evaluation:
        found = target(x, False)
        return Evaluation(found.potential + (x.square() / variance).flatten(1).sum(1) / 2, None, found.loss)

    return product


def run_chain(
    x: torch.Tensor,
    target: Target,
    settings: ChainSettings,
    draw: Draw,
    draw_uniform: Draw,
    variance: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``settings.num_steps`` steps from ``x``.

    Args:
        x: ``(P, ...)`` start.
        target: the potential to sample.
        settings: kernel and its hyper-parameters.
        draw: standard normal noise like ``x``.
        draw_uniform: uniform noise ``(P,)``, used by ``mh`` only.
        variance: of a Gaussian about 0 that multiplies the target, broadcast against ``x``; its part of U is taken
            without error (:mod:`particledaps.diffusion.split_steps`). None: the target is all there is.

    Returns:
        The last positions and the data loss ``(P,)`` at the last evaluation.

    Raises:
        ValueError: the kernel is unknown.
    """
    if settings.kernel not in KERNELS:
        raise ValueError(f"kernel={settings.kernel!r}: allowed are {', '.join(KERNELS)}")
    if settings.kernel == "mh":
        target = target if variance is None else with_gaussian(target, variance)
        current = target(x, False)
        for _ in range(settings.num_steps):
            x, current = metropolis_step(x, current, target, settings.step_size, draw(), draw_uniform())
        return x, current.loss
    momentum = settings.momentum if settings.kernel == "hmc" else 0.0
    velocity = draw() if momentum else torch.zeros_like(x)
    step_size: torch.Tensor | float = settings.step_size
    loss = x.new_zeros(len(x))
    for index in range(settings.num_steps):
        gradient, loss = evaluate(target, x)
        if index == 0 and settings.curvature_limit is not None:
            stable = settings.curvature_limit / curvature_along(x, gradient, target)
            step_size = stable.clamp(max=settings.step_size)
        if momentum and variance is not None:
            x, velocity = rotation_step(x, velocity, gradient, variance, step_size, momentum, draw())
        elif momentum:
            x, velocity = hmc_step(x, velocity, gradient, step_size, momentum, draw())
        elif variance is not None:
            x = crank_nicolson_step(x, gradient, variance, step_size, draw())
        else:
            x = langevin_step(x, gradient, step_size, draw())
    return x, loss
