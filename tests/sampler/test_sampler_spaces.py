"""Chains in pixels, and around a posterior mean with a measured covariance."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from analytic import (
    F64,
    ImpulseStreams,
    MatrixAutoencoder,
    MatrixOperator,
    SharedStreams,
    gaussian_prior,
    moments,
    normal,
    prior_of,
    relative_error,
    stream_chain_noise,
)
from sampler_support import (
    KERNELS,
    MATRIX,
    PRIOR_COVARIANCE,
    PRIOR_MEAN,
    TAU,
    Y,
    assert_same,
    each_kernel,
    impulse_response,
    measurement,
    problem,
    run,
    settings,
)

from particledaps.diffusion.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from particledaps.diffusion.covariance import CovarianceTable
from particledaps.diffusion.mcmc import ChainSettings
from particledaps.operators.operator import Operator
from particledaps.particles import level_posterior
from particledaps.particles.clean_estimate import NUM_LEVELS, measured_covariance, measured_levels
from particledaps.particles.data_term import PixelTerm
from particledaps.particles.local_posterior import local_posterior
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams
from sampler import Info, LatentDAPS, SamplerSettings


def posterior_mean_path(sigma):
    return torch.tensor([sigma, 0.0], dtype=F64)


def analytic_table(path, covariance, shape):
    """``S s^2 (S + s^2)^-1`` at every level of a path, of one band."""
    sigmas = sorted(path[:-1].tolist())
    eye = torch.eye(len(covariance), dtype=F64)
    blocks = [(covariance @ torch.linalg.inv(covariance + s**2 * eye) * s**2)[None] for s in sigmas]
    return CovarianceTable(sigmas, torch.stack(blocks), shape)


# --- pixels -----------------------------------------------------------------------------------------------------------


@each_kernel
def test_in_pixels_a_pixel_prior_runs_as_in_latents(chain):
    plain = settings(chain=chain)
    assert_same(run(dataclasses.replace(plain, space="pixel")), run(plain), exact=False)


def test_in_pixels_an_isometric_decoder_gives_the_posterior_of_the_latents(monkeypatch):
    """Mean and covariance of the answer from its response to every unit of noise: turned noise is white noise."""
    rotation = torch.linalg.qr(normal(3, 3, seed=9)).Q
    both = gaussian_prior(PRIOR_MEAN, PRIOR_COVARIANCE, MatrixAutoencoder(rotation)), MatrixOperator(MATRIX)
    found = {}
    for space in ("latent", "pixel"):
        own = settings(chain=KERNELS["hmc"], space=space)
        found[space] = impulse_response(own, monkeypatch, 1 + own.chain.num_steps, both)
    for value, expected in zip(found["pixel"], found["latent"], strict=True):
        assert relative_error(value, expected) < 1e-9


def test_in_pixels_no_decoder_gradient_is_taken_and_the_way_back_is_logged(monkeypatch):
    stretch = MatrixAutoencoder(torch.diag(torch.tensor([1.0, 2.0, 0.5], dtype=F64)))
    lossy = type("Lossy", (), {"decode": stretch.decode, "encode": lambda self, x: stretch.encode(x) + 0.25})()
    prior, info = gaussian_prior(PRIOR_MEAN, PRIOR_COVARIANCE, lossy), Info()
    monkeypatch.setattr(type(prior), "decode_with_pullback", None)  # any call of it fails
    loop = LatentDAPS(prior, MatrixOperator(MATRIX), settings(space="pixel"))
    state = loop.sample(measurement(), ParticleStreams(1, 0), [4, 7], info)
    rows = info.rows["encoder"]
    assert [row["step"] for row in rows] == list(range(5)) and rows[0]["particle_ids"] == [4, 7]
    expected = (stretch.decode(torch.full((1, 3, 1, 1), 0.25, dtype=F64)).square().mean()).sqrt().item()
    assert all(moved == pytest.approx(expected) for row in rows for moved in row["moved"])
    decoded = prior.decode(state.z0_y)
    torch.testing.assert_close(state.loss, MatrixOperator(MATRIX).loss(decoded, state.y), rtol=0, atol=0)


def test_a_chain_in_pixels_sees_the_gradient_of_its_potential():
    centre, x, direction = (normal(3, 3, 1, 1, seed=i) for i in range(3))
    term = PixelTerm(MatrixOperator(MATRIX), measurement().expand(3, 2))
    target = local_posterior(term, centre, 0.4, 1 / (2 * TAU**2))
    difference = (target(x + direction, False).potential - target(x - direction, False).potential) / 2
    slope = (target(x, True).gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(difference, slope, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("change", [{"space": "pixel"}, {"covariance": analytic_table}])
def test_levels_of_parts_are_refused(change):
    prior, operator = problem()
    path = torch.stack([edm_path(3, 4.0, 0.5)] * 3, 1)
    with pytest.raises(ValueError, match="one noise level for all parts"):
        LatentDAPS(dataclasses.replace(prior, parts=(1, 1, 1)), operator, settings(path=path, **change))


# --- measured covariance ----------------------------------------------------------------------------------------------


def unobserved_std(covariance, space="latent"):
    """Standard deviation at the end of a direction of which nothing is measured, prior N(0, 1), 50 levels."""
    prior = prior_of(GaussianDenoiser(torch.zeros(1, 1, 1, dtype=F64), torch.eye(1, dtype=F64)), (1, 1, 1))
    path = edm_path(50, 10.0, 0.1)
    own = settings(
        path=path,
        inner_path=posterior_mean_path if covariance else lambda sigma: edm_path(2, sigma, 0.001),
        chain=ChainSettings("langevin", 80, 0.15 if covariance else 4e-4),
        step_size_min_ratio=1.0,
        covariance=analytic_table(path, torch.eye(1, dtype=F64), (1, 1, 1)) if covariance else None,
        space=space,
    )
    draws = 1 + own.num_levels * 81
    state = LatentDAPS(prior, MatrixOperator(np.zeros((1, 1))), own).sample(
        torch.zeros(1, 1, dtype=F64), ImpulseStreams(), range(draws + 1)
    )
    return moments(state.z0_y)[1].item() ** 0.5


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_an_unobserved_direction_keeps_the_width_of_the_prior(monkeypatch, space):
    monkeypatch.setattr(level_posterior, "chain_noise", stream_chain_noise)
    assert unobserved_std(covariance=True, space=space) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("space", ["latent", "pixel"])
@pytest.mark.parametrize("chain", [ChainSettings("langevin", 400, 0.01), ChainSettings("hmc", 300, 0.005, 0.7)])
def test_with_its_covariance_a_gaussian_comes_to_its_exact_posterior(monkeypatch, chain, space):
    """The start N(0, sigma_max^2) is a little off the truth's; every later level is exact but for the steps."""
    path = edm_path(8, 40.0, 0.5)
    table = analytic_table(path, PRIOR_COVARIANCE, (3, 1, 1))
    own = settings(chain, path=path, inner_path=posterior_mean_path, step_size_min_ratio=1.0, covariance=table)
    own = dataclasses.replace(own, space=space)
    mean, covariance = impulse_response(own, monkeypatch, chain.num_steps + (chain.kernel == "hmc"))
    exact = np.linalg.inv(np.linalg.inv(PRIOR_COVARIANCE.numpy()) + MATRIX.T @ MATRIX / TAU**2)
    exact_mean = exact @ (np.linalg.inv(PRIOR_COVARIANCE.numpy()) @ PRIOR_MEAN + MATRIX.T @ Y / TAU**2)
    assert relative_error(mean, exact_mean) < 0.02
    assert relative_error(covariance, exact) < 0.02


def test_the_table_measured_on_a_gaussian_is_the_analytic_one():
    shape, std = (2, 16, 16), 0.7
    denoiser = GaussianDenoiser(torch.zeros(shape, dtype=F64), std**2)
    prior = dataclasses.replace(prior_of(denoiser, shape), latent_std=std)
    z0 = std * normal(64, *shape, seed=4)
    path = edm_path(6, 5.0, 0.1)
    table = measured_covariance(prior, path, in_pixels=False, z0=z0)
    assert table.sigmas == sorted(path[:-1].tolist())
    for sigma in (0.1, 0.4, 5.0):
        expected = 1 / (1 / std**2 + 1 / sigma**2)
        assert table.root_mean_square(sigma) == pytest.approx(expected**0.5, rel=0.02)
        found = table.at(sigma)
        torch.testing.assert_close(found / expected, torch.eye(2, dtype=F64).expand_as(found), rtol=0, atol=0.6)
        assert (found[4:] / expected - torch.eye(2, dtype=F64)).abs().max() < 0.2  # bands of many coefficients


def test_it_is_measured_on_draws_of_the_prior_itself():
    shape, std = (1, 8, 8), 0.4
    prior = dataclasses.replace(prior_of(GaussianDenoiser(torch.zeros(shape), std**2), shape), latent_std=std)
    path = edm_path(4, 5.0, 0.2)
    tables = [measured_covariance(prior, path, in_pixels=pixels) for pixels in (False, True)]
    expected = (1 / (1 / std**2 + 1 / 0.2**2)) ** 0.5
    assert tables[0].root_mean_square(0.2) == pytest.approx(expected, rel=0.05)
    assert torch.equal(tables[0].matrices, tables[1].matrices)


def test_long_paths_are_measured_at_some_of_their_levels():
    path = edm_path(200, 100.0, 0.1)
    levels = measured_levels(path.tolist())
    assert len(levels) == NUM_LEVELS
    assert levels[0] == pytest.approx(path[-2].item()) and levels[-1] == pytest.approx(path[0].item())
    ratios = [b / a for a, b in zip(levels[:-1], levels[1:], strict=True)]
    assert max(ratios) == pytest.approx(min(ratios))


# --- a mixture of two modes -------------------------------------------------------------------------------------------

WEIGHT, MODE, STD = 0.3, 1.5, 0.5


class Nothing(Operator):
    """Measures nothing of use: noise alone."""

    name = "nothing"
    noise_sigma = 1.0

    def __call__(self, x):
        return 0 * x.flatten(1)

    def measurement_shape(self, image_shape):
        return (math.prod(image_shape),)


def test_mode_weights_of_a_mixture(monkeypatch):
    monkeypatch.setattr(level_posterior, "chain_noise", stream_chain_noise)
    means = torch.tensor([-MODE, MODE], dtype=F64).reshape(2, 1, 1, 1)
    weights = torch.tensor([WEIGHT, 1 - WEIGHT], dtype=F64)
    denoiser = GaussianMixtureDenoiser(weights, means, torch.full((2,), STD, dtype=F64))
    prior = prior_of(denoiser, (1, 1, 1))
    z0 = means[(torch.rand(4000, generator=torch.Generator().manual_seed(0)) > WEIGHT).long()]
    z0 = z0 + STD * normal(4000, 1, 1, 1, seed=2)
    path = edm_path(40, 10.0, 0.1)
    own = SamplerSettings(
        path=path,
        inner_path=posterior_mean_path,
        chain=ChainSettings("langevin", 40, 0.3),
        step_size_min_ratio=1.0,
        tau=1.0,
        covariance=measured_covariance(prior, path, in_pixels=True, z0=z0),
        space="pixel",
    )
    loop = LatentDAPS(prior, Nothing(), own)
    found = loop.sample(torch.zeros(1, 1, dtype=F64), SharedStreams(3), range(6000)).z0_y.flatten()
    assert (found < 0).double().mean().item() == pytest.approx(WEIGHT, abs=0.03)


# --- exact draws ------------------------------------------------------------------------------------------------------


class AffineOperator(MatrixOperator):
    """``A(x) = W x + b``."""

    linear = True

    def __call__(self, x):
        return super().__call__(x) + 0.3


@pytest.mark.parametrize("around", ["sigma", "measured"])
def test_one_exact_draw_a_level_is_a_converged_chain(monkeypatch, around):
    monkeypatch.setattr(level_posterior, "chain_noise", stream_chain_noise)
    path = edm_path(8, 40.0, 0.5)
    table = analytic_table(path, PRIOR_COVARIANCE, (3, 1, 1)) if around == "measured" else None
    own = settings(ChainSettings("cg", 20), path=path, inner_path=posterior_mean_path, covariance=table, space="pixel")
    loop = LatentDAPS(gaussian_prior(PRIOR_MEAN, PRIOR_COVARIANCE), AffineOperator(MATRIX), own)
    samples = loop.sample(measurement(), SharedStreams(5), range(20_000)).z0_y.flatten(1).numpy()
    mean, covariance = converged_chains(own)
    assert np.abs(samples.mean(0) - mean).max() < 0.03
    assert relative_error(np.cov(samples.T), covariance) < 0.03


def converged_chains(own):
    """Mean and covariance of the answer where every level's chain has converged."""
    prior = np.linalg.inv(PRIOR_COVARIANCE.numpy())
    mean, covariance = np.zeros(3), own.path[0].item() ** 2 * np.eye(3)
    information, offset = MATRIX.T @ MATRIX / TAU**2, MATRIX.T @ (Y - 0.3) / TAU**2
    for sigma, after in zip(own.path[:-1].tolist(), own.path[1:].tolist(), strict=True):
        gain = np.linalg.inv(prior + np.eye(3) / sigma**2)
        clean = np.linalg.inv(prior + np.eye(3) / sigma**2) if own.covariance else sigma**2 * np.eye(3)
        drawn = np.linalg.inv(np.linalg.inv(clean) + information)
        shift = gain @ (prior @ PRIOR_MEAN)
        turn = drawn @ np.linalg.inv(clean)
        mean = turn @ (gain @ mean / sigma**2 + shift) + drawn @ offset
        answer = turn @ gain @ (covariance / sigma**4) @ gain.T @ turn.T + drawn
        covariance = answer + after**2 * np.eye(3)
    return mean, answer
