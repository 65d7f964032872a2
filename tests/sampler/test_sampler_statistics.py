import dataclasses
import math

import numpy as np
import pytest
import torch
from analytic import F64, MatrixOperator, SharedStreams, gaussian_prior, prior_of, relative_error, stream_chain_noise
from sampler_support import (
    LEVELS,
    MATRIX,
    PRIOR_COVARIANCE,
    PRIOR_MEAN,
    SIGMA_MAX,
    SIGMA_MIN,
    TAU,
    Y,
    edm_levels,
    impulse_response,
    measurement,
    ode_map,
    settings,
)

from particledaps.diffusion.analytic import GaussianMixtureDenoiser
from particledaps.diffusion.mcmc import ChainSettings
from particledaps.particles import level_posterior
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams
from sampler import LatentDAPS, SamplerSettings

# --- The default sampler against its own closed-form recursion -------------------------------------------------------


def local_target(sigma, run_settings):
    """The level's target ``N(P^-1 (b + centre / sigma^2), P^-1)``: its precision ``P`` and ``b``."""
    precision = MATRIX.T @ MATRIX / TAU**2 + np.eye(3) / sigma**2
    information = MATRIX.T @ Y / TAU**2
    if run_settings.prior_term == "exact":
        prior_precision = np.linalg.inv(PRIOR_COVARIANCE.numpy() + run_settings.prior_sigma**2 * np.eye(3))
        precision, information = precision + prior_precision, information + prior_precision @ PRIOR_MEAN
    return precision, information


def step_size(run_settings, level):
    return run_settings.chain.step_size * (1 + level / (LEVELS - 1) * (run_settings.step_size_min_ratio - 1))


def chain_step(run_settings, level, precision, information, sigma):
    """One step on ``(x, v, centre)``: matrix, shift, noise covariance. Momentum 0 is Langevin."""
    kept, h, eye, zero = run_settings.chain.momentum, step_size(run_settings, level) ** 0.5, np.eye(3), np.zeros((3, 3))
    velocity = np.hstack([-h * precision, kept * eye, h * eye / sigma**2])
    matrix = np.vstack([np.hstack([eye, zero, zero]) + h * velocity, velocity, np.hstack([zero, zero, eye])])
    shift = np.concatenate([h * h * information, h * information, np.zeros(3)])
    carrier = np.vstack([h * eye, eye, zero])
    return matrix, shift, 2 * (1 - kept) * carrier @ carrier.T


def compose(second, first):
    """Two affine steps with added noise, one after the other, as one step."""
    (matrix, shift, noise), (other_matrix, other_shift, other_noise) = second, first
    return matrix @ other_matrix, matrix @ other_shift + shift, matrix @ other_noise @ matrix.T + noise


def discrete_chain(run_settings, level, precision, information, sigma, joint):
    """Mean and covariance of ``(x, v, centre)`` after all steps of the level's chain (powers by squaring)."""
    step, remaining = chain_step(run_settings, level, precision, information, sigma), run_settings.chain.num_steps
    whole = np.eye(9), np.zeros(9), np.zeros((9, 9))
    while remaining:
        whole = compose(step, whole) if remaining % 2 else whole
        step, remaining = compose(step, step), remaining // 2
    mean, covariance = joint
    matrix, shift, noise = whole
    return (matrix @ mean + shift)[:3], (matrix @ covariance @ matrix.T + noise)[:3, :3]


def converged_chain(run_settings, level, precision, information, sigma, joint):
    """Mean and covariance of a draw from the target, given the distribution of its centre."""
    mean, covariance = joint
    inverse = np.linalg.inv(precision)
    gain = inverse / sigma**2
    return inverse @ information + gain @ mean[6:], gain @ covariance[6:, 6:] @ gain.T + inverse


def recursion(run_settings, chain):
    """Mean and covariance of the sampler's answer, level by level."""
    levels = edm_levels(LEVELS, SIGMA_MAX, SIGMA_MIN)
    mean, covariance = np.zeros(3), levels[0] ** 2 * np.eye(3)
    for level, sigma in enumerate(levels[:-1]):
        gain, shift = ode_map(sigma, run_settings.solver)
        centre_gain, centre_shift = (np.eye(3), np.zeros(3)) if run_settings.prior_term == "exact" else (gain, shift)
        spread = np.vstack([gain, np.zeros((3, 3)), centre_gain])
        joint_mean = np.concatenate([gain @ mean + shift, np.zeros(3), centre_gain @ mean + centre_shift])
        joint_covariance = spread @ covariance @ spread.T
        if run_settings.chain.momentum:
            joint_covariance[3:6, 3:6] = np.eye(3)
        target = local_target(sigma, run_settings)
        mean, covariance = chain(run_settings, level, *target, sigma, (joint_mean, joint_covariance))
        answer, covariance = (mean, covariance), covariance + levels[level + 1] ** 2 * np.eye(3)
    return answer


LANGEVIN = ChainSettings("langevin", 12, 0.02)
HMC = ChainSettings("hmc", 12, 0.01, momentum=0.6)
CONVERGED = ChainSettings("hmc", 400, 0.004, momentum=0.95)


@pytest.mark.parametrize("prior_term", ["gaussian", "exact"])
@pytest.mark.parametrize(("chain", "draws"), [(LANGEVIN, 12), (HMC, 13)], ids=["langevin", "hmc"])
@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sampler_is_its_linear_gaussian_recursion(prior_term, chain, draws, solver, monkeypatch):
    """A short chain, far from converged: every discrete step has to be right."""
    run_settings = settings(chain, prior_term=prior_term, solver=solver, prior_sigma=0.1)
    mean, covariance = impulse_response(run_settings, monkeypatch, draws)
    expected_mean, expected_covariance = recursion(run_settings, discrete_chain)
    assert relative_error(mean, expected_mean) < 1e-9
    assert relative_error(covariance, expected_covariance) < 1e-9


@pytest.mark.parametrize("prior_term", ["gaussian", "exact"])
def test_discrete_recursion_tends_to_the_closed_form(prior_term):
    """Long chains of small steps end in ``N(P^-1 b, P^-1)`` of each level."""
    long = settings(ChainSettings("langevin", 1_000_000, 2e-4), prior_term=prior_term, step_size_min_ratio=1.0)
    for value, expected in zip(recursion(long, discrete_chain), recursion(long, converged_chain), strict=True):
        assert relative_error(value, expected) < 1e-3


def test_default_sampler_against_its_closed_form(monkeypatch):
    """Chains so long that each level draws from ``N(P^-1 b, P^-1)``: nothing of the kernel is left in the answer."""
    mean, covariance = impulse_response(settings(CONVERGED, step_size_min_ratio=1.0), monkeypatch, 401)
    expected_mean, expected_covariance = recursion(settings(), converged_chain)
    assert relative_error(mean, expected_mean) < 1e-3
    assert relative_error(covariance, expected_covariance) < 1e-3


@pytest.mark.parametrize("prior_term", ["gaussian", "exact"])
def test_recursion_notices_the_missing_half(prior_term, monkeypatch):
    run_settings = settings(LANGEVIN, prior_term=prior_term)
    doubled = dataclasses.replace(run_settings, likelihood_half=False)
    mean, covariance = impulse_response(doubled, monkeypatch, 12)
    expected_mean, expected_covariance = recursion(run_settings, discrete_chain)
    assert relative_error(mean, expected_mean) > 1e-2
    assert relative_error(covariance, expected_covariance) > 1e-2


def unobserved_std():
    """Exact ODE, exact draws from ``N(z0_hat, sigma^2)``, prior N(0, 1): std of the last answer."""
    variance, levels = 100.0, edm_levels(50, 10.0, 0.1)
    for sigma, sigma_next in zip(levels[:-1], levels[1:], strict=True):
        answer = variance / (1 + sigma**2) + sigma**2
        variance = answer + sigma_next**2
    return answer**0.5


class ExactDraws(SamplerSettings):
    """A Langevin step of half the variance from the centre of ``N(z0_hat, sigma^2)`` is a draw from it."""

    def step_size(self, level):
        return self.path[level].item() ** 2 / 2


def test_default_target_inflates_unobserved_directions():
    """Prior N(0, 1) and nothing measured: std 1.50 instead of 1, even though ODE and MCMC are exact."""
    size, count = 400, 20
    run_settings = ExactDraws(
        path=edm_path(50, 10.0, 0.1),
        inner_path=lambda sigma: edm_path(25, sigma, 0.002),
        chain=ChainSettings("langevin", 1),
        step_size_min_ratio=1.0,
        tau=1.0,
        solver="heun",
    )
    blind = LatentDAPS(gaussian_prior(np.zeros(size), 1.0), MatrixOperator(np.zeros((1, size))), run_settings)
    state = blind.sample(torch.zeros(1, 1, dtype=F64), ParticleStreams(1, 0), range(count))
    assert unobserved_std() == pytest.approx(1.50, abs=0.005)
    assert state.z0_y.std().item() == pytest.approx(unobserved_std(), rel=0.03)


# --- prior_term="exact" against the exact posterior ------------------------------------------------------------------


def exact_posterior():
    prior_precision = np.linalg.inv(PRIOR_COVARIANCE.numpy())
    covariance = np.linalg.inv(prior_precision + MATRIX.T @ MATRIX / TAU**2)
    return covariance @ (prior_precision @ PRIOR_MEAN + MATRIX.T @ Y / TAU**2), covariance


def test_exact_prior_term_samples_the_gaussian_posterior(monkeypatch):
    run_settings = settings(CONVERGED, prior_term="exact", step_size_min_ratio=1.0)
    mean, covariance = impulse_response(run_settings, monkeypatch, 401)
    expected_mean, expected_covariance = exact_posterior()
    assert relative_error(mean, expected_mean) < 3e-3
    assert relative_error(covariance, expected_covariance) < 3e-3


def test_default_prior_term_does_not_sample_the_posterior():
    _, covariance = recursion(settings(), converged_chain)
    assert relative_error(covariance, exact_posterior()[1]) > 0.2


WEIGHTS, STDS = np.array([0.3, 0.7]), np.array([0.6, 0.7])
MEANS = np.array([[-1.0, 0.4], [0.9, -0.3]])
GAIN, MIXTURE_TAU, MIXTURE_Y = np.array([[0.6, -0.8]]), 0.8, np.array([-1.4])


def mixture_posterior():
    """Weight of the first component, mean and covariance of the posterior, component by component."""
    weights, means, covariances = [], [], []
    for weight, mean, std in zip(WEIGHTS, MEANS, STDS, strict=True):
        evidence = (GAIN @ GAIN.T).item() * std**2 + MIXTURE_TAU**2
        residual = (MIXTURE_Y - GAIN @ mean).item()
        weights.append(weight * math.exp(-(residual**2) / (2 * evidence)) / evidence**0.5)
        covariance = np.linalg.inv(np.eye(2) / std**2 + GAIN.T @ GAIN / MIXTURE_TAU**2)
        covariances.append(covariance)
        means.append(covariance @ (mean / std**2 + GAIN.T @ MIXTURE_Y / MIXTURE_TAU**2))
    weights, means = np.array(weights) / sum(weights), np.array(means)
    mean = weights @ means
    spread = sum(w * (c + np.outer(m - mean, m - mean)) for w, c, m in zip(weights, covariances, means, strict=True))
    return weights[0], mean, spread


def first_component(x):
    """Probability under the prior that ``x`` came from the first component; its posterior mean is the weight."""
    logs = [
        np.log(w) - 2 * np.log(s) - ((x - m) ** 2).sum(1) / (2 * s**2)
        for w, m, s in zip(WEIGHTS, MEANS, STDS, strict=True)
    ]
    return 1 / (1 + np.exp(logs[1] - logs[0]))


def mixture_samples(prior_term, monkeypatch, count=4000):
    monkeypatch.setattr(level_posterior, "chain_noise", stream_chain_noise)
    arrays = (torch.from_numpy(a) for a in (WEIGHTS, MEANS[..., None, None], STDS))
    run_settings = SamplerSettings(
        path=edm_path(8, 6.0, 0.5),
        inner_path=lambda sigma: edm_path(8, sigma, 0.02),
        chain=ChainSettings("hmc", 100, 0.01, momentum=0.8),
        step_size_min_ratio=1.0,
        tau=MIXTURE_TAU,
        prior_term=prior_term,
    )
    prior = prior_of(GaussianMixtureDenoiser(*arrays), (2, 1, 1))
    mixture_loop = LatentDAPS(prior, MatrixOperator(GAIN), run_settings)
    return mixture_loop.sample(measurement(MIXTURE_Y), SharedStreams(3), range(count)).z0_y.flatten(1).numpy()


def test_exact_prior_term_samples_a_mixture_posterior_with_its_mode_weights(monkeypatch):
    samples = mixture_samples("exact", monkeypatch)
    weight, mean, covariance = mixture_posterior()
    assert first_component(samples).mean() == pytest.approx(weight, abs=0.03)
    assert np.abs(samples.mean(0) - mean).max() < 0.05
    assert relative_error(np.cov(samples.T), covariance) < 0.08


def test_default_prior_term_misses_the_mixture_posterior(monkeypatch):
    samples = mixture_samples("gaussian", monkeypatch)
    assert abs(first_component(samples).mean() - mixture_posterior()[0]) > 0.05
    assert relative_error(np.cov(samples.T), mixture_posterior()[2]) > 0.2
