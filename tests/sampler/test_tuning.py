"""A sampler that sets itself: what it measures, and where the particles end with what it chose."""

import dataclasses
import math

import pytest
import torch
from analytic import F64, correlated, prior_of, relative_error

import tuning
from particledaps.diffusion.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from particledaps.diffusion.chain_measures import autocorrelation_time, largest_curvature
from particledaps.diffusion.covariance import dct_matrix
from particledaps.operators.operator import Operator
from particledaps.particles.clean_estimate import measured_covariance
from particledaps.settings.schema import AnnealingSettings, ChainConfig, CompatSettings, OdeSettings
from particledaps.streams import ParticleStreams
from sampler import LatentDAPS, build_sampler_settings

SHAPE = (1, 4, 4)
SIZE = math.prod(SHAPE)
CPU = torch.device("cpu")


class Rows(Operator):
    """``A(x) = W x``."""

    name = "rows"

    def __init__(self, matrix, noise_sigma=0.1, linear=True):
        self.matrix, self.noise_sigma, self.linear = matrix, noise_sigma, linear

    def __call__(self, x):
        return x.flatten(1) @ self.matrix.T.to(x)

    def measurement_shape(self, image_shape):
        return (len(self.matrix),)


class Magnitude(Rows):
    """``A(x) = |W x|``: two answers for every y."""

    name = "magnitude"

    def __call__(self, x):
        return super().__call__(x).abs()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def stationary():
    """A covariance that falls over the frequencies, as an image's: diagonal in the discrete cosine transform."""
    t = dct_matrix(SHAPE[-1])
    basis = torch.kron(t, t)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    return basis.T @ torch.diag(1 / (1 + rows.double() ** 2 + columns.double() ** 2).flatten()) @ basis


def ended(prior, operator, tuned, y, count=400):
    """Where particles end with the values that were chosen."""
    own = tuned.values
    settings = build_sampler_settings(
        AnnealingSettings(**own["annealing"]), OdeSettings(**own["ode"]), ChainConfig(**own["mcmc"]), CompatSettings()
    )
    table = measured_covariance(prior, settings.path, True)
    loop = LatentDAPS(prior, operator, dataclasses.replace(settings, covariance=table))
    return loop.sample(y, ParticleStreams(1, 0), range(count)).z0_y


@pytest.mark.parametrize("linear", [True, False], ids=["cg", "hmc"])
def test_on_a_gaussian_the_particles_are_posterior_samples(linear):
    covariance, matrix = stationary(), torch.randn(8, SIZE, generator=generator(3), dtype=F64) / 4
    mean = torch.full(SHAPE, 0.3)
    prior, operator = prior_of(GaussianDenoiser(mean, covariance.float()), SHAPE), Rows(matrix, linear=linear)
    tuned = tuning.tune(prior, operator, CPU)
    assert tuned.measured["band"] is None and tuned.values["mcmc"]["kernel"] == ("cg" if linear else "hmc")
    assert tuned.values["mcmc"]["tau"] == pytest.approx(0.1, rel=1e-3)  # the identity autoencoder misses nothing
    truth = mean.double() + (
        torch.linalg.cholesky(covariance) @ torch.randn(SIZE, generator=generator(5), dtype=F64)
    ).reshape(SHAPE)
    y = operator.measure(truth[None].float(), generator(6))
    z = ended(prior, operator, tuned, y)
    gain = covariance @ matrix.T @ torch.linalg.inv(matrix @ covariance @ matrix.T + 0.01 * torch.eye(8, dtype=F64))
    exact = mean.flatten().double() + gain @ (y[0].double() - matrix @ mean.flatten().double())
    assert relative_error(z.double().mean(0).flatten(), exact) < 0.05
    floor = operator.noise_floor(y)
    expected = matrix @ (covariance - gain @ matrix @ covariance) @ matrix.T  # the posterior's own spread in y
    loss = operator.loss(z, y).double().mean()
    residual = (matrix @ exact - y[0].double()).square().sum()
    assert loss == pytest.approx((residual + expected.trace()).item(), rel=0.1)
    assert abs(loss - floor.mean) < 3 * floor.std


def test_on_a_mixture_the_band_lies_where_the_modes_part():
    """Modes 2 apart on either side of y's blind direction: above the band noise hides them, below it decides."""
    centre = torch.zeros(SHAPE)
    centre[0, 0, 0] = 1.0
    denoiser = GaussianMixtureDenoiser(torch.ones(2), torch.stack([centre, -centre]), torch.full((2,), 0.05))
    prior = prior_of(denoiser, SHAPE)
    matrix = torch.eye(SIZE, dtype=F64)[1:9]
    operator = Rows(matrix)
    tuned = tuning.tune(prior, operator, CPU)
    high, low = tuned.measured["band"]
    assert low < 0.5 < high < 4  # the modes are told apart at sigma about half their distance
    assert tuned.values["annealing"]["num_steps"] == tuning.LEVELS_WITH_BAND
    y = operator(centre[None])
    z = ended(prior, operator, tuned, y)
    assert (z[:, 0, 0, 0] > 0).double().mean() == pytest.approx(0.5, abs=0.1)  # y says nothing of it
    assert z[:, 0, 0, 0].abs().mean() == pytest.approx(1.0, rel=0.05)


def test_the_largest_curvature_is_the_largest_eigenvalue():
    matrix = correlated([0.5, 2.0, 7.0])
    found = largest_curvature(lambda x: x @ matrix, torch.zeros(2, 3, dtype=F64), 40, generator())
    torch.testing.assert_close(found, torch.full((2,), 7.0, dtype=F64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_the_autocorrelation_time_of_an_autoregressive_chain(keep):
    """Of x' = a x + sqrt(1 - a^2) e it is (1 + a) / (1 - a)."""
    noise, x, path = torch.randn(4000, 50, generator=generator()), torch.zeros(50), []
    for step in noise:
        x = keep * x + (1 - keep**2) ** 0.5 * step
        path.append(x)
    assert autocorrelation_time(torch.stack(path)) == pytest.approx((1 + keep) / (1 - keep), rel=0.12)


@pytest.mark.parametrize(
    ("distances", "band"),
    [([1.0, 1.0, 0.9, 1.1], None), ([1.0, 1.0, 0.1, 0.01], (2.0, 1.0)), ([1.0, 0.6, 0.3, 0.01], (2.0, 0.5))],
)
def test_the_band_is_where_restarts_begin_to_part(distances, band):
    assert tuning.band_of_decision([4.0, 2.0, 1.0, 0.5], distances) == band
