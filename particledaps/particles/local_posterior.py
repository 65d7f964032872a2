r"""What the chain of one level samples: the prior around the level's clean estimate, times the likelihood.

.. math:: U(x) = c \, L(x) + \tfrac12 (x - m)^T C^{-1} (x - m), \qquad c = 1 / 2 \tau^2

in latents, where :math:`L(z) = |A(D(z)) - y|^2` takes a decoder forward and backward a step, or in pixels, where
:math:`L(x) = |A(x) - y|^2` takes the operator alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from particledaps.diffusion.conjugate_gradients import conjugate_gradients
from particledaps.diffusion.covariance import BandedCovariance, WhiteCovariance
from particledaps.diffusion.mcmc import ChainSettings, Draw, Evaluation, Target, run_chain

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.particles.data_term import Data


def local_posterior(
    data: Data,
    centre: torch.Tensor,
    variance: torch.Tensor | float,
    likelihood: float,
    prior_score: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Target:
    r"""The target with one variance for all elements, or one a part.

    Args:
        data: loss and gradient.
        centre: m.
        variance: C, a number or broadcast against the positions.
        likelihood: c.
        prior_score: added to the target as the score of a further factor; there is no potential then
            (Metropolis-Hastings needs one).
    """
    by_part = isinstance(variance, torch.Tensor)

    def target(x: torch.Tensor, with_gradient: bool) -> Evaluation:
        loss, gradient = data(x, with_gradient)
        offset = x - centre
        squares = offset.square() / variance if by_part else offset.square()
        distance = squares.flatten(1).sum(1) / (2 if by_part else 2 * variance)
        potential = likelihood * loss + distance
        if gradient is not None:
            gradient = likelihood * gradient + offset / variance
            if prior_score is not None:
                with torch.no_grad():
                    gradient = gradient - prior_score(x)
        return Evaluation(potential, gradient, loss)

    return target


def draw_exactly(
    operator: Operator,
    y: torch.Tensor,
    centre: torch.Tensor,
    covariance: WhiteCovariance | BandedCovariance,
    likelihood: float,
    num_steps: int,
    noise: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""One exact draw from the target in pixels, where the operator is linear (Papandreou and Yuille 2010).

    The minimum of U for :math:`y + \epsilon / \sqrt{2 c}` and :math:`m + C^{1/2} \xi` is a draw; conjugate gradients
    find it in the coordinates :math:`C^{-1/2} (x - m)`.

    Args:
        operator: a linear one.
        y: ``(P, ...)``.
        centre: m, ``(P, C, H, W)``.
        covariance: C.
        likelihood: c.
        num_steps: of the conjugate gradients at most, one operator and one adjoint each.
        noise: white, like ``centre`` and like ``y``.

    Returns:
        The draws and their data losses ``(P,)``.
    """
    root = covariance.variance.sqrt()

    def coloured(white: torch.Tensor) -> torch.Tensor:
        return covariance.from_basis(root * white)

    def whitened(gradient: torch.Tensor) -> torch.Tensor:
        return likelihood * root * covariance.to_basis(gradient)

    curvature = operator.objective(operator(torch.zeros_like(centre)))  # its gradient is that of |A v - A 0|^2
    moved = centre + coloured(noise[0])
    _, gradient = operator.objective(y + noise[1] / (2 * likelihood) ** 0.5)(moved)
    step = conjugate_gradients(lambda w: w + whitened(curvature(coloured(w))[1]), -whitened(gradient), num_steps)
    x = moved + coloured(step)
    return x, operator.loss(x, y)


def run_banded_chain(
    data: Data,
    centre: torch.Tensor,
    covariance: BandedCovariance,
    likelihood: float,
    chain: ChainSettings,
    draw: Draw,
    draw_uniform: Draw,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample the target with a covariance of bands, from its centre on, in the basis where it is diagonal.

    Returns:
        The last positions and the data loss ``(P,)`` at the last evaluation.
    """

    def target(a: torch.Tensor, with_gradient: bool) -> Evaluation:
        loss, gradient = data(centre + covariance.from_basis(a), with_gradient)
        if gradient is not None:
            gradient = likelihood * covariance.to_basis(gradient)
        return Evaluation(likelihood * loss, gradient, loss)

    a, loss = run_chain(torch.zeros_like(centre), target, chain, draw, draw_uniform, covariance.variance)
    return centre + covariance.from_basis(a), loss
