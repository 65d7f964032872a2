import dataclasses
import math

import numpy as np
import pytest
import torch
from analytic import F64, MatrixAutoencoder, MatrixOperator, gaussian_prior, latent, normal, relative_error
from sampler_support import (
    LEVELS,
    MATRIX,
    PRIOR_COVARIANCE,
    PRIOR_MEAN,
    TAU,
    Recorder,
    Y,
    assert_same,
    each_kernel,
    full_state,
    impulse_response,
    measurement,
    problem,
    run,
    settings,
)

from particledaps.diffusion.mcmc import ChainSettings
from particledaps.particles import level_posterior
from particledaps.particles.data_term import DataTerm
from particledaps.particles.local_posterior import local_posterior
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams
from sampler import LatentDAPS


@each_kernel
def test_likelihood_without_half_is_a_smaller_tau(chain):
    doubled = run(settings(chain, likelihood_half=False))
    assert_same(doubled, run(settings(chain, tau=TAU / math.sqrt(2))), exact=False)
    assert not torch.allclose(doubled.z0_y, run(settings(chain)).z0_y, rtol=1e-3)


def test_data_term_is_the_latent_gradient_of_the_loss():
    decoder = MatrixAutoencoder(normal(3, 3, seed=8))
    prior, operator = gaussian_prior(PRIOR_MEAN, 1.0, decoder), MatrixOperator(MATRIX)
    z = latent(normal(4, 3, seed=9)).requires_grad_(True)
    y = measurement().expand(4, 2)
    expected_loss = operator.loss(decoder.decode(z), y)
    (expected,) = torch.autograd.grad(expected_loss.sum(), z)
    term = DataTerm(prior, operator, y)
    loss, gradient = term(z.detach(), True)
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(term(z.detach(), False)[0], loss) and term(z.detach(), False)[1] is None


@pytest.mark.parametrize("half", [True, False])
def test_potential_of_the_local_target_belongs_to_its_gradient(half):
    """Metropolis-Hastings sees the potential, the other kernels its gradient: central differences are exact here."""
    state, run_settings = dataclasses.replace(full_state(3), sigma=0.6), settings(likelihood_half=half)
    state = dataclasses.replace(state, **{n: latent(normal(3, 3, seed=i)) for i, n in enumerate(("z", "z0_hat"))})
    prior, operator = problem()
    term = DataTerm(prior, operator, measurement().expand(3, 2))
    target = local_posterior(term, state.z0_hat, state.sigma**2, run_settings.likelihood)
    x, direction = latent(normal(3, 3, seed=5)), latent(normal(3, 3, seed=6))
    difference = (target(x + direction, False).potential - target(x - direction, False).potential) / 2
    slope = (target(x, True).gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(difference, slope, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(target(x, True).potential, target(x, False).potential, rtol=0, atol=0)


def test_chain_noise_comes_from_a_stream_per_purpose_and_level():
    state, streams, cpu = full_state(), ParticleStreams(0, 0), torch.device("cpu")
    normal_draw, uniform_draw = level_posterior.chain_noise(state, 3, state.z)
    proposals = streams.generators(state.ids, "mcmc", 3, cpu)
    deciders = streams.generators(state.ids, "accept", 3, cpu)
    for _ in range(2):
        expected = torch.stack([torch.randn(2, 3, 1, generator=g, dtype=F64) for g in proposals])
        assert torch.equal(normal_draw(), expected)
        assert torch.equal(uniform_draw(), torch.stack([torch.rand((), generator=g, dtype=F64) for g in deciders]))


@pytest.mark.parametrize("clamp", [0.5, 1.0])
def test_gradient_clamp_bounds_each_element_of_the_latent_gradient(clamp):
    decoder = MatrixAutoencoder(normal(3, 3, seed=8))
    prior, operator = gaussian_prior(PRIOR_MEAN, 1.0, decoder), MatrixOperator(MATRIX)
    y, z = measurement().expand(4, 2), latent(normal(4, 3, seed=9))
    free = DataTerm(prior, operator, y)(z, True)[1]
    clamped = DataTerm(prior, operator, y, gradient_clamp=clamp)(z, True)[1]
    assert free.abs().max() > clamp > free.abs().min()
    assert torch.equal(clamped, free.clamp(-clamp, clamp))


@pytest.mark.parametrize("size", [1, 3, 4])
def test_decoding_in_parts_changes_nothing(size):
    decoder = MatrixAutoencoder(normal(3, 3, seed=8))
    prior, operator = gaussian_prior(PRIOR_MEAN, 1.0, decoder), MatrixOperator(MATRIX)
    y, z = normal(4, 2, seed=7), latent(normal(4, 3, seed=9))
    in_parts = dataclasses.replace(prior, decode_batch=size)
    whole, parts = (DataTerm(p, operator, y)(z, True) for p in (prior, in_parts))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert_same(run(settings(), prior=in_parts), run(settings(), prior=prior), exact=False)


def test_gradient_clamp_reaches_the_run():
    assert not torch.equal(run(settings(gradient_clamp=0.1)).z0_y, run(settings()).z0_y)
    assert_same(run(settings(gradient_clamp=1e9)), run(settings()))


def test_step_sizes_fall_linearly_to_the_ratio():
    run_settings = settings(ChainSettings("langevin", 1, 2e-3), step_size_min_ratio=0.1)
    assert [run_settings.step_size(k) for k in range(LEVELS)] == pytest.approx(
        [2e-3 * (1 + k / 4 * (0.1 - 1)) for k in range(LEVELS)]
    )
    assert run_settings.step_size(LEVELS - 1) == pytest.approx(2e-4)


def test_step_sizes_of_daps():
    """K = 50, from 2.1e-5 to 0.12 of it: reference values at levels 0, 15, 29, 40 and 49."""
    run_settings = settings(
        ChainSettings("hmc", 65, 2.1e-5), path=edm_path(50, 10.0, 0.1), step_size_min_ratio=0.12, ratio_counts_end=True
    )
    assert [run_settings.step_size(k) for k in (0, 15, 29, 40, 49)] == pytest.approx(
        [2.1e-5, 1.56e-5, 1.05e-5, 6.5e-6, 3.24e-6], rel=5e-3
    )
    assert run_settings.step_size(49) == pytest.approx(2.1e-5 * (1 + 49 / 51 * (0.12 - 1)), rel=1e-12)


def test_one_level_has_one_step_size():
    assert settings(path=edm_path(1, 4.0, 0.5)).step_size(0) == 0.02


def test_step_size_of_each_level_reaches_the_chain():
    """One silent Langevin step at the last of two levels moves by step size times gradient."""
    run_settings = settings(ChainSettings("langevin", 1, 0.02), path=edm_path(2, 4.0, 0.5), step_size_min_ratio=0.5)
    recorder = Recorder()
    run(run_settings, [recorder])
    for level, expected in ((0, 0.02), (1, 0.01)):
        state = recorder.seen["after_mcmc"][level]
        generators = ParticleStreams(42, 0).generators([0, 1, 2, 3], "mcmc", level, torch.device("cpu"))
        noise = torch.stack([torch.randn(3, 1, 1, generator=g, dtype=F64) for g in generators])
        start = state.z0_hat.flatten(1).numpy()
        gradient = (start @ MATRIX.T - Y) @ MATRIX / TAU**2
        moved = start - expected * gradient + math.sqrt(2 * expected) * noise.flatten(1).numpy()
        np.testing.assert_allclose(state.z0_y.flatten(1), moved, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prior_term", ["gaussian", "exact"])
def test_latent_loop_is_the_pixel_loop_on_the_composed_problem(prior_term):
    """``decode(z) = M z`` measured by ``W`` is the identity measured by ``W M``."""
    decoder = normal(3, 3, seed=8)
    latents = LatentDAPS(
        gaussian_prior(PRIOR_MEAN, PRIOR_COVARIANCE, MatrixAutoencoder(decoder)),
        MatrixOperator(MATRIX),
        settings(prior_term=prior_term),
    )
    pixels = LatentDAPS(
        gaussian_prior(PRIOR_MEAN, PRIOR_COVARIANCE),
        MatrixOperator(MATRIX @ decoder.numpy()),
        settings(prior_term=prior_term),
    )
    first, second = (x.sample(measurement(), ParticleStreams(42, 0), range(4)) for x in (latents, pixels))
    assert_same(first, second, exact=False)


def test_rotated_latents_give_the_rotated_pixel_sampler(monkeypatch):
    """With an orthogonal decoder the pixel prior ``N(M m, M S M^T)`` gives the answer's image distribution."""
    basis = torch.linalg.qr(normal(3, 3, seed=8)).Q
    latent_prior = gaussian_prior(PRIOR_MEAN, PRIOR_COVARIANCE, MatrixAutoencoder(basis))
    pixel_prior = gaussian_prior(basis.numpy() @ PRIOR_MEAN, basis @ PRIOR_COVARIANCE @ basis.T)
    operator = MatrixOperator(MATRIX)
    mean, covariance = impulse_response(settings(), monkeypatch, 12, prior_and_operator=(latent_prior, operator))
    pixel_mean, pixel_covariance = impulse_response(
        settings(), monkeypatch, 12, prior_and_operator=(pixel_prior, operator)
    )
    assert relative_error(basis.numpy() @ mean, pixel_mean) < 1e-9
    assert relative_error(basis.numpy() @ covariance @ basis.numpy().T, pixel_covariance) < 1e-9
