import numpy as np
import pytest
import torch
from analytic import F64, correlated, normal

from particledaps.diffusion.analytic import GaussianDenoiser, GaussianMixtureDenoiser
from particledaps.diffusion.denoiser import EDMDenoiser, EpsilonDenoiser, VDenoiser, X0Denoiser
from particledaps.diffusion.levels import broadcast_sigma
from particledaps.diffusion.noise import DiscreteNoise, alphas_cumprod, scaled_linear_betas
from particledaps.diffusion.score import score

SHAPE = (4, 3, 2)
SIZE = 24
NOISE = DiscreteNoise(alphas_cumprod(scaled_linear_betas()))
SIGMAS = {
    "number": 0.7,
    "scalar": torch.tensor(3.0, dtype=F64),
    "one": torch.tensor([0.2], dtype=F64),
    "per_particle": torch.tensor([0.1, 0.7, 2.0, 9.0, 60.0], dtype=F64),
}
GROUPED = {
    "one_row": torch.tensor([[0.3, 2.0]], dtype=F64),
    "per_particle": torch.tensor([[0.1, 5.0], [1.0, 1.0], [3.0, 0.2], [0.5, 0.6], [9.0, 0.1]], dtype=F64),
    "per_channel": torch.tensor([[0.1, 1.0, 4.0, 0.6]], dtype=F64),
}


def gaussian():
    eigenvalues = np.geomspace(0.1, 4.0, SIZE).tolist()
    return GaussianDenoiser(normal(*SHAPE, seed=1), correlated(eigenvalues, seed=2))


def noisy(count=5):
    return 3 * normal(count, *SHAPE, seed=3)


def covariance_of(denoiser):
    return denoiser.vectors @ torch.diag(denoiser.values) @ denoiser.vectors.T


def brute_force_denoiser(denoiser, z, variances):
    """``mu + C (C + V)^-1 (z - mu)`` by a linear solve per particle; ``variances`` ``(P, n)`` is the diagonal of V."""
    covariance, mean = covariance_of(denoiser), denoiser.mean.flatten()
    rows = [
        mean + covariance @ torch.linalg.solve(covariance + torch.diag(v), row - mean)
        for row, v in zip(z.flatten(1), variances, strict=True)
    ]
    return torch.stack(rows).reshape(z.shape)


def element_variances(sigma, z):
    """Variance of the noise on every element ``(P, n)``, spelt out with loops."""
    sigma = torch.as_tensor(sigma, dtype=z.dtype)
    result = torch.empty_like(z)
    for p in range(z.shape[0]):
        for c in range(z.shape[1]):
            if sigma.ndim == 2:
                value = sigma[p % len(sigma), c * sigma.shape[1] // z.shape[1]]
            else:
                value = sigma if sigma.ndim == 0 else sigma[p % len(sigma)]
            result[p, c] = value**2
    return result.flatten(1)


class NetworkOf:
    """The network that a wrapper needs in order to be the denoiser ``D``, from the definitions of its target."""

    def __init__(self, denoiser, predicts):
        self.denoiser, self.predicts = denoiser, predicts

    def __call__(self, scaled, t):
        sigma = NOISE.t_to_sigma(t)
        s = sigma.reshape(-1, 1, 1, 1)
        alpha_bar = 1 / (1 + s**2)
        z = scaled / alpha_bar.sqrt()
        z0 = self.denoiser(z, sigma)
        epsilon = (scaled - alpha_bar.sqrt() * z0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * z0
        return {"epsilon": epsilon, "v": v, "x0": z0}[self.predicts]


@pytest.mark.parametrize("sigma", SIGMAS.values(), ids=SIGMAS)
@pytest.mark.parametrize(("wrapper", "predicts"), [(EpsilonDenoiser, "epsilon"), (VDenoiser, "v"), (X0Denoiser, "x0")])
def test_wrapped_network_is_the_denoiser_it_was_made_from(wrapper, predicts, sigma):
    denoiser, z = gaussian(), noisy()
    wrapped = wrapper(NetworkOf(denoiser, predicts), NOISE)
    torch.testing.assert_close(wrapped(z, sigma), denoiser(z, sigma), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sigma", SIGMAS.values(), ids=SIGMAS)
@pytest.mark.parametrize(("sigma_data", "noise_scale"), [(1.0, 0.25), (0.5, 250.0)])
def test_edm_preconditioning_of_a_network_is_the_denoiser_it_was_made_from(sigma, sigma_data, noise_scale):
    """Karras et al. 2022, eq. 8 solved for F with the c's of table 1."""
    denoiser, z = gaussian(), noisy()

    def network(scaled, c_noise):
        level = (c_noise / noise_scale).exp()
        s = level.reshape(-1, 1, 1, 1)
        c_skip = sigma_data**2 / (s**2 + sigma_data**2)
        c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
        original = scaled * (s**2 + sigma_data**2).sqrt()
        return (denoiser(original, level) - c_skip * original) / c_out

    wrapped = EDMDenoiser(network, sigma_data, noise_scale)
    torch.testing.assert_close(wrapped(z, sigma), denoiser(z, sigma), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sigma", SIGMAS.values(), ids=SIGMAS)
def test_networks_get_one_timestep_a_particle(sigma):
    seen = []

    def network(scaled, t):
        seen.append(t)
        return torch.zeros_like(scaled)

    z = noisy()
    EpsilonDenoiser(network, NOISE)(z, sigma)
    expected = NOISE.sigma_to_t(torch.as_tensor(sigma, dtype=F64).expand(len(z)))
    assert torch.equal(seen[0], expected)


@pytest.mark.parametrize("wrapper", [EpsilonDenoiser, VDenoiser, X0Denoiser])
def test_networks_with_one_level_refuse_two(wrapper):
    with pytest.raises(ValueError, match="one noise level"):
        wrapper(lambda scaled, t: scaled, NOISE)(noisy(), GROUPED["one_row"])


@pytest.mark.parametrize("sigma", SIGMAS.values(), ids=SIGMAS)
def test_gaussian_denoiser_is_the_conditional_mean(sigma):
    denoiser, z = gaussian(), noisy()
    expected = brute_force_denoiser(denoiser, z, element_variances(sigma, z))
    torch.testing.assert_close(denoiser(z, sigma), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma", GROUPED.values(), ids=GROUPED)
def test_gaussian_denoiser_with_independently_noised_groups_isotropic(sigma):
    denoiser, z = GaussianDenoiser(normal(*SHAPE, seed=1), 0.8), noisy()
    expected = brute_force_denoiser(denoiser, z, element_variances(sigma, z))
    torch.testing.assert_close(denoiser(z, sigma), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sigma", GROUPED.values(), ids=GROUPED)
def test_gaussian_denoiser_with_independently_noised_groups_correlated(sigma):
    denoiser, z = gaussian(), noisy()
    expected = brute_force_denoiser(denoiser, z, element_variances(sigma, z))
    torch.testing.assert_close(denoiser(z, sigma), expected, rtol=1e-10, atol=1e-10)


def test_number_and_matrix_covariance_agree():
    mean, z = normal(*SHAPE, seed=1), noisy()
    number, matrix = GaussianDenoiser(mean, 0.8), GaussianDenoiser(mean, 0.8 * torch.eye(SIZE, dtype=F64))
    torch.testing.assert_close(number(z, 0.5), matrix(z, 0.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sigma", SIGMAS.values(), ids=SIGMAS)
def test_score_is_the_gradient_of_the_gaussian_log_density(sigma):
    denoiser, z = gaussian(), noisy()
    variances = element_variances(sigma, z)
    rows = [
        -torch.linalg.solve(covariance_of(denoiser) + torch.diag(v), row)
        for row, v in zip((z - denoiser.mean).flatten(1), variances, strict=True)
    ]
    torch.testing.assert_close(score(denoiser, z, sigma), torch.stack(rows).reshape(z.shape), rtol=1e-9, atol=1e-9)


def test_score_with_independently_noised_groups():
    denoiser, z, sigma = GaussianDenoiser(normal(*SHAPE, seed=1), 0.8), noisy(), GROUPED["per_particle"]
    expected = -(z - denoiser.mean) / (0.8 + element_variances(sigma, z).reshape(z.shape))
    torch.testing.assert_close(score(denoiser, z, sigma), expected, rtol=1e-9, atol=1e-9)


def mixture():
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=F64)
    return weights, normal(3, *SHAPE, seed=4), torch.tensor([0.5, 1.2, 0.8], dtype=F64)


def mixture_log_density(z, sigma, weights, means, stds):
    """Log density of the noisy mixture by torch.distributions, ``(P,)``."""
    sigma = torch.as_tensor(sigma, dtype=F64).expand(len(z))
    terms = []
    for weight, mean, std in zip(weights / weights.sum(), means, stds, strict=True):
        scale = (std**2 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
        terms.append(weight.log() + torch.distributions.Normal(mean, scale).log_prob(z).flatten(1).sum(1))
    return torch.logsumexp(torch.stack(terms), 0)


@pytest.mark.parametrize("sigma", [0.05, *SIGMAS.values()], ids=["small", *SIGMAS])
def test_mixture_denoiser_follows_the_score_of_its_log_density(sigma):
    weights, means, stds = mixture()
    z = (means.mean(0) + normal(5, *SHAPE, seed=5)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(mixture_log_density(z, sigma, weights, means, stds).sum(), z)
    expected = z.detach() + broadcast_sigma(sigma, z).square() * gradient
    denoised = GaussianMixtureDenoiser(weights, means, stds)(z.detach(), sigma)
    torch.testing.assert_close(denoised, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.1, 0.6, 3.0])
def test_mixture_denoiser_is_the_conditional_mean_by_quadrature(sigma):
    weights, means, stds = np.array([0.3, 0.7]), np.array([-1.0, 1.5]), np.array([0.4, 0.7])
    denoiser = GaussianMixtureDenoiser(*(torch.from_numpy(a) for a in (weights, means.reshape(2, 1, 1, 1), stds)))
    grid, z = np.linspace(-12, 12, 40_001), np.array([-2.0, -0.2, 0.3, 2.5])
    prior = (weights * np.exp(-((grid[:, None] - means) ** 2) / (2 * stds**2)) / stds).sum(1)
    posterior = prior * np.exp(-((z[:, None] - grid) ** 2) / (2 * sigma**2))
    expected = (posterior * grid).sum(1) / posterior.sum(1)
    np.testing.assert_allclose(denoiser(torch.from_numpy(z.reshape(4, 1, 1, 1)), sigma).flatten(), expected, rtol=1e-8)


def test_mixture_of_one_is_the_gaussian():
    mean, z = normal(*SHAPE, seed=1), noisy()
    one = GaussianMixtureDenoiser(torch.ones(1, dtype=F64), mean[None], torch.full((1,), 0.9, dtype=F64))
    torch.testing.assert_close(one(z, 0.5), GaussianDenoiser(mean, 0.81)(z, 0.5), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (5, 3), (2, 1), (5, 2, 1), (0,)])
def test_sigma_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="does not fit"):
        broadcast_sigma(torch.ones(shape), noisy())


def test_groups_are_equal_runs_of_channels():
    z = torch.zeros(2, 6, 1, 1)
    spread = broadcast_sigma(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), z)
    assert spread.shape == (2, 6, 1, 1)
    assert spread.flatten(1).tolist() == [[1, 1, 2, 2, 3, 3], [4, 4, 5, 5, 6, 6]]
