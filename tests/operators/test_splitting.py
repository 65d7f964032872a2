"""The split sub-problems of phase retrieval against automatic differentiation, in float64."""

import pytest
import torch
from analytic import F64, correlated, normal

from particledaps.diffusion.covariance import BandedCovariance, WhiteCovariance, band_of
from particledaps.operators.measured import leave_out
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.particles.splitting import amplitude_step, minimise_by_splitting

SHAPE = (2, 8, 10)
OPERATOR = PhaseRetrieval(noise_sigma=1e-3)
TRUTH = (0.5 * normal(1, *SHAPE)).clamp(-1, 1)


def measured(gaps=False):
    y = OPERATOR.measure(TRUTH, torch.Generator().manual_seed(0))
    if gaps:
        y[..., :3, :] = torch.nan  # single entries of pairs
        y[..., 5:8, 6:9] = torch.nan  # whole pairs about the centre
    operator, filled = leave_out(OPERATOR, y[0])
    return operator, filled[None]


def covariances():
    bands = int(band_of(*SHAPE[1:]).max()) + 1
    matrices = torch.stack([correlated([0.05, 0.01], seed=b) / (1 + b) for b in range(bands)])
    like = torch.zeros(1, dtype=F64)
    return {"white": WhiteCovariance(0.02, like), "banded": BandedCovariance(matrices, SHAPE, like)}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_the_amplitude_step_is_a_minimum(share, beta):
    v = torch.complex(normal(50, seed=1), normal(50, seed=2))
    amplitudes = normal(50, seed=3).abs()
    parts = torch.view_as_real(amplitude_step(v, amplitudes, share, beta)).clone().requires_grad_(True)
    s = torch.view_as_complex(parts)
    value = (share * (s.abs() - amplitudes).square() + beta * (s - v).abs().square()).sum()
    (gradient,) = torch.autograd.grad(value, parts)
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("around", ["white", "banded"])
@pytest.mark.parametrize("gaps", [False, True])
def test_where_it_stands_still_the_whole_target_is_stationary(around, gaps):
    operator, y = measured(gaps)
    covariance, likelihood = covariances()[around], 40.0
    centre = TRUTH + 0.05 * normal(1, *SHAPE, seed=4)
    x, loss = minimise_by_splitting(operator, y, centre, covariance, likelihood, 3000, beta=10.0)
    torch.testing.assert_close(loss, operator.loss(x, y), rtol=0, atol=0)

    def gradient_at(where):
        leaf = where.clone().requires_grad_(True)
        offset = covariance.to_basis(leaf - centre)
        value = likelihood * operator.loss(leaf, y).sum() + (offset.square() / covariance.variance).sum() / 2
        return torch.autograd.grad(value, leaf)[0].norm()

    assert gradient_at(x) < 1e-4 * gradient_at(centre)


def test_spectrum_and_back_projection_are_adjoint_and_keep_the_image():
    x, y = normal(2, *SHAPE), OPERATOR(TRUTH)
    torch.testing.assert_close(OPERATOR.back_projection(OPERATOR.spectrum(x), y.shape[-2:], x.shape), (x + 1) / 2)
    plane = torch.fft.rfft2(normal(2, *y.shape[1:], seed=7), norm="ortho")
    weight = OPERATOR.column_weight(y)
    both = (weight * (OPERATOR.spectrum(2 * x - 1).conj() * plane).real).sum()  # 2 x - 1: the image x in [0, 1]
    torch.testing.assert_close(both, (x * OPERATOR.back_projection(plane, y.shape[-2:], x.shape)).sum())
