"""Exact draws in pixels for every linear operator."""

import math

import pytest
import torch
from analytic import correlated, normal
from every_operator import LINEAR, SHAPE, bound, images

from particledaps.diffusion.covariance import BandedCovariance, WhiteCovariance, band_of
from particledaps.operators.measured import leave_out
from particledaps.particles.local_posterior import draw_exactly


def banded(like):
    bands = int(band_of(*SHAPE[1:]).max()) + 1
    matrices = torch.stack([correlated([0.2, 0.02, 0.005], seed=b) / (1 + b) for b in range(bands)])
    covariance = BandedCovariance(matrices, SHAPE, like)
    return covariance, covariance.solve


def white(like):
    return WhiteCovariance(0.03, like), lambda offset: offset / 0.03


@pytest.mark.parametrize("make", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("around", [white, banded])
@pytest.mark.parametrize("gaps", [False, True])
def test_an_exact_draw_is_where_the_gradient_of_the_perturbed_target_vanishes(make, gaps, around):
    """In float64, against automatic differentiation of U as it is written."""
    operator, x = bound(make), images(2)
    y = operator(x) + 0.05 * normal(*operator(x).shape, seed=3)
    if gaps:
        hole = torch.zeros_like(y[0], dtype=torch.bool)
        hole[..., 1] = True
        operator, _ = leave_out(operator, y[0].masked_fill(hole, torch.nan))
    covariance, inverse = around(x)
    centre, likelihood = images(2, seed=5), 200.0
    noise = normal(*x.shape, seed=6), normal(*y.shape, seed=7)
    drawn, loss = draw_exactly(operator, y, centre, covariance, likelihood, 500, noise)
    leaf = drawn.clone().requires_grad_(True)
    mean = centre + covariance.from_basis(covariance.variance.sqrt() * noise[0])
    offset = leaf - mean
    perturbed = y + noise[1] / math.sqrt(2 * likelihood)
    potential = likelihood * operator.loss(leaf, perturbed).sum() + (offset * inverse(offset)).sum() / 2
    (gradient,) = torch.autograd.grad(potential, leaf)
    (at_mean,) = torch.autograd.grad(likelihood * operator.loss(m := mean.requires_grad_(True), perturbed).sum(), m)
    assert gradient.norm() < 1e-3 * at_mean.norm()
    torch.testing.assert_close(loss, operator.loss(drawn, y), rtol=0, atol=0)
