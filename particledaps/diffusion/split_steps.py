r"""Kernels on :math:`U(a) = \Phi(a) + \sum a_i^2 / 2 v_i` that take the Gaussian part of it without error.

A measured covariance spans orders of magnitude, and an explicit step is only as long as its smallest variance allows.
These kernels leave the Gaussian part exactly invariant at any step size, so that the step is set by :math:`\Phi` alone.
As the variances go to infinity they become those of :mod:`particledaps.diffusion.mcmc`.
"""

from __future__ import annotations

import math

import torch

from particledaps.diffusion.levels import per_particle


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
