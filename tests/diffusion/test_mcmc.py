import math

import pytest
import torch
from analytic import F64, correlated, normal

from particledaps.diffusion.mcmc import (
    ChainSettings,
    Evaluation,
    curvature_along,
    hmc_step,
    langevin_step,
    metropolis_step,
    run_chain,
)

CHAINS, TAU = 4096, 0.8
PRIOR_MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=F64)
PRIOR_PRECISION = correlated([0.7, 1.0, 1.6], seed=1)
MATRIX = torch.tensor([[0.9, -0.4, 0.3], [0.2, 0.8, -0.5]], dtype=F64)
Y = torch.tensor([2.5, -2.0], dtype=F64)
PRECISION = PRIOR_PRECISION + MATRIX.T @ MATRIX / TAU**2
COVARIANCE = torch.linalg.inv(PRECISION)
MEAN = COVARIANCE @ (PRIOR_PRECISION @ PRIOR_MEAN + MATRIX.T @ Y / TAU**2)

KERNELS = {
    "langevin": ChainSettings("langevin", num_steps=800, step_size=0.01),
    "hmc": ChainSettings("hmc", num_steps=400, step_size=0.006, momentum=0.7),
    "mh": ChainSettings("mh", num_steps=500, step_size=0.8),
}


def posterior(factor=0.5):
    """``U = factor |W x - y|^2 / tau^2 + (x - m)^T P (x - m) / 2``: a posterior with factor 1/2."""

    def target(x, with_gradient):
        residual, offset = x @ MATRIX.T - Y, x - PRIOR_MEAN
        loss = residual.square().sum(1)
        potential = factor * loss / TAU**2 + (offset @ PRIOR_PRECISION * offset).sum(1) / 2
        gradient = 2 * factor * residual @ MATRIX / TAU**2 + offset @ PRIOR_PRECISION
        return Evaluation(potential, gradient if with_gradient else None, loss)

    return target


def quadratic(eigenvalues, seed=2):
    matrix = correlated(eigenvalues, seed)

    def target(x, with_gradient):
        gradient = x @ matrix
        potential = (x * gradient).sum(1) / 2
        return Evaluation(potential, gradient if with_gradient else None, potential)

    return target, matrix


def draws(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        lambda: torch.randn(shape, generator=generator, dtype=F64),
        lambda: torch.rand(shape[0], generator=generator, dtype=F64),
    )


def run(settings, target, start=None, seed=0):
    x = PRIOR_MEAN.expand(CHAINS, 3).clone() if start is None else start
    return run_chain(x, target, settings, *draws(x.shape, seed))


def worst_z(samples):
    return ((samples.mean(0) - MEAN) / (COVARIANCE.diagonal() / len(samples)).sqrt()).abs().max().item()


def covariance_error(samples):
    return ((samples.T.cov() - COVARIANCE).norm() / COVARIANCE.norm()).item()


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_samples_its_gaussian_posterior(name):
    samples, _ = run(KERNELS[name], posterior())
    assert worst_z(samples) < 4
    assert covariance_error(samples) < 0.06


@pytest.mark.parametrize("name", KERNELS)
def test_likelihood_without_the_half_is_noticed(name):
    samples, _ = run(KERNELS[name], posterior(factor=1.0))
    assert worst_z(samples) > 4
    assert covariance_error(samples) > 0.06


def test_metropolis_has_no_step_size_bias():
    """Steps as wide as the posterior, where the other kernels would be far off."""
    samples, _ = run(ChainSettings("mh", num_steps=400, step_size=2.0), posterior())
    assert worst_z(samples) < 4
    assert covariance_error(samples) < 0.06


@pytest.mark.parametrize("momentum", [0.0, 0.7])
def test_hmc_moves_like_langevin_of_step_size_over_one_minus_momentum(momentum):
    """On a flat target the variance of n steps tends to ``2 n eta / (1 - m)``."""
    step, count = 0.01, 400

    def flat(x, with_gradient):
        return Evaluation(x.new_zeros(len(x)), torch.zeros_like(x), x.new_zeros(len(x)))

    start = torch.zeros(CHAINS, 4, dtype=F64)
    x, _ = run(ChainSettings("hmc", count, step, momentum), flat, start)
    assert x.var().item() == pytest.approx(2 * count * step / (1 - momentum), rel=0.05)


def test_langevin_step_by_hand():
    x, gradient, noise = (torch.tensor([[v]], dtype=F64) for v in (1.0, 3.0, -0.5))
    assert langevin_step(x, gradient, 0.08, noise).item() == pytest.approx(1 - 0.24 - 0.4 * 0.5)


def test_hmc_step_by_hand():
    x, velocity, gradient, noise = (torch.tensor([[v]], dtype=F64) for v in (1.0, 2.0, 3.0, -0.5))
    moved, kicked = hmc_step(x, velocity, gradient, 0.04, 0.875, noise)
    expected = 0.875 * 2 - 0.2 * 3 - math.sqrt(0.25) * 0.5
    assert kicked.item() == pytest.approx(expected)
    assert moved.item() == pytest.approx(1 + 0.2 * expected)


@pytest.mark.parametrize("step_size", [0.02, torch.linspace(0.001, 0.1, 5, dtype=F64)], ids=["number", "per_particle"])
def test_hmc_step_without_momentum_is_a_langevin_step(step_size):
    x, velocity, gradient, noise = (normal(5, 3, seed=s) for s in range(4))
    moved, _ = hmc_step(x, velocity, gradient, step_size, 0.0, noise)
    torch.testing.assert_close(moved, langevin_step(x, gradient, step_size, noise), rtol=1e-12, atol=1e-12)


def test_hmc_chain_without_momentum_is_the_langevin_chain():
    start = normal(16, 3)
    hmc = run(ChainSettings("hmc", 20, 0.01, momentum=0.0), posterior(), start)
    langevin = run(ChainSettings("langevin", 20, 0.01, momentum=0.9), posterior(), start)
    torch.testing.assert_close(hmc, langevin, rtol=1e-12, atol=1e-12)


def test_metropolis_acceptance_is_the_ratio_of_densities():
    """Uniform draws just below and just above ``exp(U - U')``."""
    target, _ = quadratic([1.0])
    x, noise = torch.full((2, 1), 0.5, dtype=F64), torch.full((2, 1), 1.0, dtype=F64)
    ratio = math.exp((0.5**2 - 1.1**2) / 2)
    uniform = torch.tensor([ratio * 0.999, ratio * 1.001], dtype=F64)
    moved, kept = metropolis_step(x, target(x, False), target, 0.36, noise, uniform)
    assert moved.flatten().tolist() == pytest.approx([1.1, 0.5])
    assert kept.potential.tolist() == pytest.approx([1.1**2 / 2, 0.5**2 / 2])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_metropolis_refuses_proposals_that_are_not_finite(value):
    target, _ = quadratic([1.0, 1.0])

    def cliff(x, with_gradient):
        potential, gradient, loss = target(x, with_gradient)
        bad = x[:, 0] > 0
        return Evaluation(torch.where(bad, value, potential), gradient, torch.where(bad, value, loss))

    start = -normal(200, 2, seed=3).abs()
    x, loss = run(ChainSettings("mh", 60, 0.5), cliff, start)
    assert (x[:, 0] <= 0).all() and x.isfinite().all() and loss.isfinite().all()
    assert not torch.equal(x, start)


def test_metropolis_returns_the_loss_where_it_stands():
    x, loss = run(KERNELS["mh"], posterior(), normal(64, 3))
    torch.testing.assert_close(loss, posterior()(x, False).loss, rtol=1e-12, atol=1e-12)


def test_gradient_chain_returns_the_loss_of_its_last_evaluation():
    start = normal(8, 3)
    before, _ = run(ChainSettings("langevin", 4, 0.01), posterior(), start)
    _, loss = run(ChainSettings("langevin", 5, 0.01), posterior(), start)
    torch.testing.assert_close(loss, posterior()(before, False).loss, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "evaluations"), [("langevin", 7), ("hmc", 7), ("mh", 8)])
def test_number_of_target_evaluations(kernel, evaluations):
    calls = []

    def counted(x, with_gradient):
        calls.append(with_gradient)
        return posterior()(x, with_gradient)

    run(ChainSettings(kernel, 7, 0.01, momentum=0.5), counted, normal(4, 3))
    assert calls == [kernel != "mh"] * evaluations


def test_curvature_along_the_stiffest_direction_is_the_top_eigenvalue():
    target, matrix = quadratic([0.5, 2.0, 40.0])
    x = torch.linalg.eigh(matrix).eigenvectors.T.clone()
    curvature = curvature_along(x, target(x, True).gradient, target)
    torch.testing.assert_close(curvature, torch.tensor([0.5, 2.0, 40.0], dtype=F64), rtol=1e-9, atol=0)


def test_curvature_limit_caps_the_step_of_each_particle():
    """Without noise one step along an eigenvector multiplies it by ``1 - step * eigenvalue``."""
    eigenvalues = torch.tensor([0.5, 2.0, 40.0], dtype=F64)
    target, matrix = quadratic(eigenvalues.tolist())
    x = torch.linalg.eigh(matrix).eigenvectors.T.clone()
    settings = ChainSettings("langevin", 1, step_size=0.6, curvature_limit=0.8)
    moved, _ = run_chain(x, target, settings, lambda: torch.zeros_like(x), lambda: None)
    steps = (1 - (moved * x).sum(1)) / eigenvalues
    torch.testing.assert_close(steps, torch.tensor([0.6, 0.4, 0.02], dtype=F64), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("limit", "bounded"), [(1.0, True), (None, False)])
def test_curvature_limit_keeps_a_stiff_chain_stable(limit, bounded):
    target, _ = quadratic([0.5, 2.0, 400.0])
    x, _ = run(ChainSettings("langevin", 300, 0.1, curvature_limit=limit), target, normal(64, 3))
    assert bool(x.abs().max() < 20) == bounded


def test_curvature_limit_at_a_stationary_point_keeps_the_step():
    target, _ = quadratic([0.5, 2.0, 40.0])
    settings = ChainSettings("langevin", 1, step_size=0.3, curvature_limit=0.5)
    x = torch.zeros(2, 3, dtype=F64)
    moved, _ = run_chain(x, target, settings, lambda: torch.ones_like(x), lambda: None)
    torch.testing.assert_close(moved, torch.full_like(x, math.sqrt(0.6)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("name", KERNELS)
def test_nan_in_one_particle_leaves_the_others_alone(name, limit):
    kernel = KERNELS[name]
    settings = ChainSettings(kernel.kernel, 30, kernel.step_size, kernel.momentum, limit)
    start = normal(6, 3, seed=5)
    broken = start.clone()
    broken[2] = math.nan
    others = [0, 1, 3, 4, 5]
    healthy, _ = run(settings, posterior(), start)
    hurt, _ = run(settings, posterior(), broken)
    assert torch.equal(hurt[others], healthy[others])
    assert not hurt[2].isfinite().any()


def test_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="langevin, hmc, mh"):
        run(ChainSettings("gibbs"), posterior(), normal(2, 3))
