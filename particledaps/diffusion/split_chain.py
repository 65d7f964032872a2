r"""MCMC on :math:`U(a) = \Phi(a) + \sum a_i^2 / 2 v_i`, the Gaussian part of which the kernels take without error.

A measured covariance spans orders of magnitude, and an explicit step is only as long as its smallest variance allows.
These kernels leave the Gaussian part exactly invariant at any step size, so that the step is set by :math:`\Phi` alone.
As the variances go to infinity they become those of :mod:`particledaps.diffusion.mcmc`.
"""

from __future__ import annotations

import math

import torch

from particledaps.diffusion.levels import per_particle
from particledaps.diffusion.mcmc import (
    ChainSettings,
    Draw,
    Evaluation,
    Target,
    curvature_along,
    evaluate,
    metropolis_step,
)


def crank_nicolson_step(
    a: torch.Tensor,
    gradient: torch.Tensor,
    variance: torch.Tensor,
    step_size: torch.Tensor | float,
    noise: torch.Tensor,
) -> torch.Tensor:
    r"""Langevin with the Gaussian part by Crank-Nicolson (Cotter et al. 2013, "CNL").

    .. math:: (2 + \eta / v) a' = (2 - \eta / v) a - 2 \eta \nabla \Phi + \sqrt{8 \eta} \, \epsilon

    Without :math:`\Phi` it keeps N(0, v) exactly. Where :math:`\Phi = \kappa a^2 / 2`, the variance is
    :math:`1 / ((\kappa + 1 / v) (1 - \eta \kappa / 2))`.
    """
    step = per_particle(step_size, a)
    share = step / variance
    return ((2 - share) * a - 2 * step * gradient + (8 * step) ** 0.5 * noise) / (2 + share)


def rotation_step(
    a: torch.Tensor,
    velocity: torch.Tensor,
    gradient: torch.Tensor,
    variance: torch.Tensor,
    step_size: torch.Tensor | float,
    momentum: float,
    noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Under-damped Langevin with the Gaussian part as an exact rotation (split HMC, Shahbaba et al. 2014).

    .. math:: u = m v - \tfrac{1 + m}{2} h \nabla \Phi + \sqrt{1 - m^2} \, \epsilon, \qquad
        a' = a \cos\phi + s u \sin\phi, \quad v' = -a \sin\phi / s + u \cos\phi

    with s the standard deviation, :math:`\phi = h / s` and :math:`h = \sqrt{2 \eta / (1 + m)}`: half a kick before the
    refreshment of the velocities and half after it. Without :math:`\Phi` it keeps N(0, s^2) and unit velocities
    exactly; with infinite s it is :func:`particledaps.diffusion.mcmc.hmc_step` with step size :math:`\eta`.
    """
    h = (2 * per_particle(step_size, a) / (1 + momentum)) ** 0.5
    std = variance.sqrt()
    velocity = momentum * velocity - (1 + momentum) / 2 * h * gradient + math.sqrt(1 - momentum**2) * noise
    cosine, sine = (h / std).cos(), (h / std).sin()
    return a * cosine + std * velocity * sine, velocity * cosine - a * sine / std


def run_split_chain(
    a: torch.Tensor, data: Target, variance: torch.Tensor, settings: ChainSettings, draw: Draw, draw_uniform: Draw
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run ``settings.num_steps`` steps from ``a`` ``(P, ...)``.

    Args:
        a: start.
        data: the potential Phi without the Gaussian part.
        variance: of the Gaussian part about 0, broadcast against ``a``.
        settings: kernel (``langevin``, ``hmc`` or ``mh``) and its hyper-parameters.
        draw: standard normal noise like ``a``.
        draw_uniform: uniform noise ``(P,)``, used by ``mh`` only.

    Returns:
        The last positions and the data loss ``(P,)`` at the last evaluation.
    """
    if settings.kernel == "mh":
        target = _whole(data, variance)
        current = target(a, False)
        for _ in range(settings.num_steps):
            a, current = metropolis_step(a, current, target, settings.step_size, draw(), draw_uniform())
        return a, current.loss
    momentum = settings.momentum if settings.kernel == "hmc" else 0.0
    velocity = draw() if momentum else torch.zeros_like(a)
    step_size: torch.Tensor | float = settings.step_size
    loss = a.new_zeros(len(a))
    for index in range(settings.num_steps):
        gradient, loss = evaluate(data, a)
        if index == 0 and settings.curvature_limit is not None:
            stable = settings.curvature_limit / curvature_along(a, gradient, data)
            step_size = stable.clamp(max=settings.step_size)
        if momentum:
            a, velocity = rotation_step(a, velocity, gradient, variance, step_size, momentum, draw())
        else:
            a = crank_nicolson_step(a, gradient, variance, step_size, draw())
    return a, loss


def _whole(data: Target, variance: torch.Tensor) -> Target:
    """The potential with its Gaussian part, without a gradient."""

    def target(a: torch.Tensor, with_gradient: bool) -> Evaluation:
        found = data(a, False)
        return Evaluation(found.potential + (a.square() / variance).flatten(1).sum(1) / 2, None, found.loss)

    return target
