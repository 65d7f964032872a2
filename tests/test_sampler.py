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
    correlated,
    gaussian_prior,
    latent,
    moments,
    normal,
    prior_of,
    relative_error,
    stream_chain_noise,
)

import sampler
from diffusion.analytic import GaussianMixtureDenoiser
from diffusion.mcmc import ChainSettings
from diffusion.paths import edm_path
from operators.phase_retrieval import PhaseRetrieval
from runs.rng import ParticleStreams
from sampler import DataTerm, Hook, Info, LatentDAPS, SamplerSettings, State

# A prior in three dimensions of which two numbers are measured.
PRIOR_MEAN = np.array([0.4, -0.3, 1.0])
PRIOR_COVARIANCE = correlated([0.4, 1.0, 2.2], seed=1)
MATRIX = np.array([[1.0, -0.5, 0.2], [0.1, 0.7, -0.6]])
TAU, Y = 0.7, np.array([0.8, -1.1])
LEVELS, SIGMA_MAX, SIGMA_MIN, INNER_STEPS, INNER_MIN = 5, 4.0, 0.5, 3, 0.05


def inner_path(sigma):
    return edm_path(INNER_STEPS, sigma, INNER_MIN)


def settings(chain=None, **changes):
    values = {
        "path": edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN),
        "inner_path": inner_path,
        "chain": chain or ChainSettings("langevin", 12, 0.02),
        "step_size_min_ratio": 0.4,
        "tau": TAU,
    }
    return SamplerSettings(**values | changes)


def problem():
    return gaussian_prior(PRIOR_MEAN, PRIOR_COVARIANCE), MatrixOperator(MATRIX)


def measurement(y=Y):
    return torch.tensor(y, dtype=F64)[None]


def loop(run_settings, hooks=(), prior=None):
    default, operator = problem()
    return LatentDAPS(prior or default, operator, run_settings, hooks)


def run(run_settings, hooks=(), ids=(0, 1, 2, 3), prior=None):
    return loop(run_settings, hooks, prior).sample(measurement(), ParticleStreams(42, 0), list(ids))


# --- The default sampler against its own closed-form recursion -------------------------------------------------------


def edm_levels(count, high, low):
    """The annealing or inner path by hand, with its last node replaced by 0."""
    nodes = [(high ** (1 / 7) + i / count * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(count)]
    return [*nodes, 0.0]


def denoiser_map(sigma):
    """``D(z) = G z + c`` of the Gaussian prior."""
    covariance = PRIOR_COVARIANCE.numpy()
    gain = covariance @ np.linalg.inv(covariance + sigma**2 * np.eye(3))
    return gain, PRIOR_MEAN - gain @ PRIOR_MEAN


def ode_map(sigma, solver):
    """``z0_hat = G z + c`` of the discrete solver."""
    gain, shift = np.eye(3), np.zeros(3)

    def slope(level, g, c):
        denoiser_gain, denoiser_shift = denoiser_map(level)
        return (g - denoiser_gain @ g) / level, (c - denoiser_gain @ c - denoiser_shift) / level

    nodes = edm_levels(INNER_STEPS, sigma, INNER_MIN)
    for here, there in zip(nodes[:-1], nodes[1:], strict=True):
        slope_gain, slope_shift = slope(here, gain, shift)
        next_gain, next_shift = gain + (there - here) * slope_gain, shift + (there - here) * slope_shift
        if solver == "heun" and there > 0:
            second_gain, second_shift = slope(there, next_gain, next_shift)
            next_gain = gain + (there - here) * (slope_gain + second_gain) / 2
            next_shift = shift + (there - here) * (slope_shift + second_shift) / 2
        gain, shift = next_gain, next_shift
    return gain, shift


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


def impulse_response(run_settings, monkeypatch, draws_per_chain, prior_and_operator=None):
    """Mean and covariance of the sampler's answer from its own response to every unit of noise."""
    monkeypatch.setattr(sampler, "chain_noise", stream_chain_noise)
    prior, operator = prior_and_operator or problem()
    streams, draws = ImpulseStreams(), 1 + run_settings.num_levels * (1 + draws_per_chain)
    size = math.prod(prior.latent_shape)
    state = LatentDAPS(prior, operator, run_settings).sample(measurement(), streams, range(draws * size + 1))
    assert streams.draws == draws
    return moments(state.z0_y)


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
    monkeypatch.setattr(sampler, "chain_noise", stream_chain_noise)
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


# --- Particles -------------------------------------------------------------------------------------------------------

KERNELS = {
    "langevin": ChainSettings("langevin", 6, 0.02),
    "hmc": ChainSettings("hmc", 6, 0.01, momentum=0.6),
    "mh": ChainSettings("mh", 6, 0.1),
    "limited": ChainSettings("langevin", 6, 0.5, curvature_limit=0.3),
}
each_kernel = pytest.mark.parametrize("chain", KERNELS.values(), ids=KERNELS)


def tensor_fields(state):
    return {f.name for f in dataclasses.fields(State) if isinstance(getattr(state, f.name), torch.Tensor)}


def assert_same(state, expected, rows=slice(None), exact=True):
    tolerance = 0 if exact else 1e-10
    for name in tensor_fields(state):
        value, other = getattr(state, name), getattr(expected, name)[rows]
        torch.testing.assert_close(value, other, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@each_kernel
def test_four_particles_are_four_runs_of_one(chain):
    together = run(settings(chain))
    for particle in range(4):
        assert_same(run(settings(chain), ids=[particle]), together, [particle], exact=False)
    assert len({tuple(row.tolist()) for row in together.z0_y.flatten(1)}) == 4


@each_kernel
def test_a_subset_is_the_same_particles(chain):
    together = run(settings(chain))
    assert_same(run(settings(chain), ids=[3, 1]), together, [3, 1], exact=False)


@each_kernel
def test_a_run_repeats_bitwise_whatever_the_global_generator(chain):
    torch.manual_seed(1)
    first = run(settings(chain))
    torch.manual_seed(2)
    assert_same(run(settings(chain)), first)


def test_phase_retrieval_particles_are_runs_of_one():
    operator, truth = PhaseRetrieval(), normal(1, 1, 6, 6, seed=2).clamp(-1, 1)
    y = operator.measure(truth, torch.Generator().manual_seed(1))
    prior = gaussian_prior(np.zeros(36), 0.3)
    prior = dataclasses.replace(prior, image_shape=(1, 6, 6), latent_shape=(1, 6, 6))
    prior.denoiser.mean = prior.denoiser.mean.reshape(1, 6, 6)
    run_settings = settings(ChainSettings("langevin", 10, 1e-3), tau=0.2)
    together = LatentDAPS(prior, operator, run_settings).sample(y, ParticleStreams(42, 0), [0, 1, 2])
    alone = LatentDAPS(prior, operator, run_settings).sample(y, ParticleStreams(42, 0), [2])
    assert_same(alone, together, [2], exact=False)


class Recorder(Hook):
    """Keeps the states of each moment."""

    def __init__(self):
        self.seen = {"before_ode": [], "after_mcmc": [], "before_renoise": [], "at_end": []}

    def before_ode(self, state, info):
        self.seen["before_ode"].append(state)
        return state

    def after_mcmc(self, state, info):
        self.seen["after_mcmc"].append(state)
        return state

    def before_renoise(self, state, info):
        self.seen["before_renoise"].append(state)
        return state

    def at_end(self, state, info):
        self.seen["at_end"].append(state)
        return state


@each_kernel
def test_hooks_that_do_nothing_change_nothing(chain):
    plain = run(settings(chain))
    assert_same(run(settings(chain), [Hook(), Recorder(), Hook()]), plain)


def test_levels_moments_and_times():
    recorder, levels = Recorder(), edm_levels(LEVELS, SIGMA_MAX, SIGMA_MIN)
    run(settings(), [recorder])
    for moment in ("before_ode", "after_mcmc", "before_renoise"):
        states = recorder.seen[moment]
        assert [s.step for s in states] == [0, 1, 2, 3, 4]
        assert [s.t for s in states] == pytest.approx([1000, 800, 600, 400, 200])
        assert [s.sigma for s in states] == pytest.approx(levels[:-1], rel=1e-12)
    assert len(recorder.seen["at_end"]) == 1


@pytest.mark.parametrize("levels", [5, 10, 30, 50])
def test_times_are_exact_where_they_are_whole(levels):
    """``t <= 300`` must hold at level 7 of 10."""
    recorder = Recorder()
    run(settings(ChainSettings("langevin", 1, 0.02), path=edm_path(levels, 4.0, 0.5)), [recorder], ids=[0])
    for state in recorder.seen["before_ode"]:
        assert state.t == pytest.approx(1000 * (1 - state.step / levels), abs=1e-9)
        if 1000 * state.step % levels == 0:
            assert state.t == 1000 * (levels - state.step) // levels


def test_state_between_levels_is_what_its_fields_say():
    recorder = Recorder()
    run(settings(), [recorder])
    streams, levels = ParticleStreams(42, 0), edm_levels(LEVELS, SIGMA_MAX, SIGMA_MIN)
    before, after = recorder.seen["before_ode"], recorder.seen["after_mcmc"]
    start = streams.normal([0, 1, 2, 3], "start", 0, before[0].z)
    torch.testing.assert_close(before[0].z, SIGMA_MAX * start, rtol=1e-12, atol=0)
    for level in range(LEVELS):
        gain, shift = ode_map(levels[level], "euler")
        z0_hat = before[level].z.flatten(1).numpy() @ gain.T + shift
        np.testing.assert_allclose(after[level].z0_hat.flatten(1), z0_hat, rtol=1e-9, atol=1e-9)
        if level + 1 < LEVELS:
            noise = streams.normal([0, 1, 2, 3], "renoise", level, before[0].z)
            expected = after[level].z0_y + levels[level + 1] * noise
            torch.testing.assert_close(before[level + 1].z, expected, rtol=1e-12, atol=1e-12)
    last = recorder.seen["at_end"][0]
    assert torch.equal(last.z, last.z0_y)


def test_hooks_run_in_order_and_their_state_is_used():
    calls = []

    class Shift(Hook):
        def __init__(self, name, amount):
            self.name, self.amount = name, amount

        def before_renoise(self, state, info):
            calls.append(self.name)
            info.add("shift", step=state.step, name=self.name)
            return dataclasses.replace(state, z0_y=state.z0_y * self.amount + 1)

    info = Info()
    shifted = loop(settings(), [Shift("first", 2.0), Shift("second", 3.0)])
    state = shifted.start(measurement(), ParticleStreams(42, 0), [0, 1])
    after = next(shifted.levels(state, info))
    plain = next(loop(settings()).levels(state, Info()))
    assert calls == ["first", "second"]
    torch.testing.assert_close(after.z0_y, (2 * plain.z0_y + 1) * 3 + 1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.z - after.z0_y, plain.z - plain.z0_y, rtol=1e-9, atol=1e-12)
    assert info.rows == {"shift": [{"step": 0, "name": "first"}, {"step": 0, "name": "second"}]}


class Drift(Hook):
    """Sets a drift at one level."""

    def __init__(self, step, term, scale):
        self.step, self.term, self.scale = step, term, scale

    def before_ode(self, state, info):
        return dataclasses.replace(state, drift=(self.term, self.scale)) if state.step == self.step else state


@pytest.mark.parametrize("scale", [0.3, torch.tensor([0.0, 0.3, -1.0, 2.0], dtype=F64)], ids=["number", "per_particle"])
def test_drift_of_a_hook_acts_in_its_level_only(scale):
    """``D + s sigma^2 r`` in the Euler steps of level 1, the plain ODE in all others."""
    term, recorder = latent(normal(4, 3, seed=5)), Recorder()
    run(settings(), [Drift(1, term, scale), recorder])
    factor = torch.as_tensor(scale, dtype=F64).expand(4).reshape(4, 1)
    for level, sigma in enumerate(edm_levels(LEVELS, SIGMA_MAX, SIGMA_MIN)[:-1]):
        z = recorder.seen["before_ode"][level].z.flatten(1)
        nodes = edm_levels(INNER_STEPS, sigma, INNER_MIN)
        for here, there in zip(nodes[:-1], nodes[1:], strict=True):
            gain, shift = (torch.from_numpy(a) for a in denoiser_map(here))
            denoised = z @ gain.T + shift + (factor * here**2 * term.flatten(1) if level == 1 else 0)
            z = z + (there - here) / here * (z - denoised)
        torch.testing.assert_close(recorder.seen["after_mcmc"][level].z0_hat.flatten(1), z, rtol=1e-9, atol=1e-9)


def test_drift_leaves_no_trace_in_the_next_run():
    drift = Drift(0, latent(normal(4, 3, seed=5)), 0.5)
    used = loop(settings(), [drift])
    plain = run(settings())
    repelled = used.sample(measurement(), ParticleStreams(42, 0), range(4))
    assert not torch.equal(repelled.z0_y, plain.z0_y)
    drift.step = -1
    assert_same(used.sample(measurement(), ParticleStreams(42, 0), range(4)), plain)


# --- Divergence ------------------------------------------------------------------------------------------------------


class PoisonedModule(torch.nn.Module):
    """A denoiser that answers NaN for one particle in one call."""

    def __init__(self, denoiser, call, particle):
        super().__init__()
        self.denoiser, self.remaining, self.particle = denoiser, call, particle

    def forward(self, z, sigma):
        result = self.denoiser(z, sigma).clone()
        self.remaining -= 1
        if self.remaining == -1:
            result[self.particle] = torch.nan
        return result


class PoisonedOperator(MatrixOperator):
    """Loss and gradient NaN for one particle in one call."""

    def __init__(self, matrix, call, particle):
        super().__init__(matrix)
        self.remaining, self.particle = call, particle

    def objective(self, y):
        plain = super().objective(y)

        def evaluate(x):
            loss, gradient = plain(x)
            self.remaining -= 1
            if self.remaining == -1:
                loss[self.particle], gradient[self.particle] = torch.nan, torch.nan
            return loss, gradient

        return evaluate


class PoisonedHook(Hook):
    """Puts NaN into one field of one particle at one level."""

    def __init__(self, moment, name, step, particle):
        def poison(state, info):
            if state.step != step:
                return state
            value = getattr(state, name).clone()
            value[particle] = torch.nan
            return dataclasses.replace(state, **{name: value})

        setattr(self, moment, poison)


def assert_only_row_1_diverged(hurt, healthy):
    assert hurt.diverged.tolist() == [False, True, False, False]
    for name in tensor_fields(hurt):
        value = getattr(hurt, name)
        assert torch.isfinite(value).all(), name
        assert torch.equal(value[[0, 2, 3]], getattr(healthy, name)[[0, 2, 3]]), name


@each_kernel
@pytest.mark.parametrize("level", [0, 2, 4])
def test_nan_from_the_denoiser_stays_with_its_particle(chain, level):
    prior, _ = problem()
    poisoned = dataclasses.replace(prior, denoiser=PoisonedModule(prior.denoiser, level * INNER_STEPS + 1, 1))
    assert_only_row_1_diverged(run(settings(chain), prior=poisoned), run(settings(chain)))


@pytest.mark.parametrize("kernel", ["langevin", "hmc"])
@pytest.mark.parametrize("call", [0, 14, 29])
def test_nan_from_the_operator_stays_with_its_particle(kernel, call):
    prior, _ = problem()
    poisoned = LatentDAPS(prior, PoisonedOperator(MATRIX, call, 1), settings(KERNELS[kernel]))
    hurt = poisoned.sample(measurement(), ParticleStreams(42, 0), range(4))
    assert_only_row_1_diverged(hurt, run(settings(KERNELS[kernel])))


def test_metropolis_that_starts_on_a_nan_loss_is_marked():
    """The first evaluation of level 2 (7 calls a level): no proposal can be compared with it."""
    prior, _ = problem()
    poisoned = LatentDAPS(prior, PoisonedOperator(MATRIX, 14, 1), settings(KERNELS["mh"]))
    hurt = poisoned.sample(measurement(), ParticleStreams(42, 0), range(4))
    assert_only_row_1_diverged(hurt, run(settings(KERNELS["mh"])))


def test_metropolis_refuses_a_nan_proposal_and_goes_on():
    prior, _ = problem()
    poisoned = LatentDAPS(prior, PoisonedOperator(MATRIX, 16, 1), settings(KERNELS["mh"]))
    hurt, healthy = poisoned.sample(measurement(), ParticleStreams(42, 0), range(4)), run(settings(KERNELS["mh"]))
    assert not hurt.diverged.any() and hurt.z0_y.isfinite().all()
    assert torch.equal(hurt.z0_y[[0, 2, 3]], healthy.z0_y[[0, 2, 3]])


@pytest.mark.parametrize(("moment", "name"), [("before_ode", "z"), ("after_mcmc", "z0_y"), ("before_renoise", "z0_y")])
@pytest.mark.parametrize("step", [2, 4])
def test_nan_from_a_hook_stays_with_its_particle(moment, name, step):
    hurt = run(settings(), [PoisonedHook(moment, name, step, 1)])
    assert_only_row_1_diverged(hurt, run(settings()))


def test_diverged_particle_is_frozen_at_its_last_finite_level():
    recorder, plain = Recorder(), Recorder()
    run(settings(), [plain])
    run(settings(), [PoisonedHook("before_ode", "z", 2, 1), recorder])
    frozen, reference = recorder.seen["after_mcmc"], plain.seen["after_mcmc"][1]
    for state in frozen[2:]:
        assert state.diverged.tolist() == [False, True, False, False]
        for name in ("z0_hat", "z0_y", "loss"):
            assert torch.equal(getattr(state, name)[1], getattr(reference, name)[1])


# --- State -----------------------------------------------------------------------------------------------------------


def full_state(count=5):
    """Every tensor field filled with numbers that tell particles apart."""
    rows = torch.arange(count)
    values = {
        "z": normal(count, 2, 3, 1),
        "z0_hat": normal(count, 2, 3, 1, seed=1),
        "z0_y": normal(count, 2, 3, 1, seed=2),
        "y": normal(count, 7, seed=3),
        "loss": normal(count, seed=4),
        "particle_id": rows + 10,
        "parent_id": rows + 20,
        "diverged": rows % 2 == 0,
    }
    required = {f.name for f in dataclasses.fields(State) if f.type in (torch.Tensor, "torch.Tensor")}
    assert required == set(values), "a new tensor field needs a value here"
    return State(**values, streams=ParticleStreams(0, 0))


@pytest.mark.parametrize(
    "index",
    [[3, 1], slice(1, 4), torch.tensor([4, 0, 2]), torch.tensor([True, False, True, True, False])],
    ids=["list", "slice", "indices", "mask"],
)
def test_slicing_a_state_slices_every_tensor(index):
    state = full_state()
    kept = state[index]
    assert len(kept) == len(torch.arange(5)[index])
    for name in tensor_fields(state):
        assert torch.equal(getattr(kept, name), getattr(state, name)[index]), name
    assert kept.streams is state.streams and (kept.step, kept.sigma, kept.t) == (state.step, state.sigma, state.t)


def test_slicing_a_state_slices_its_drift():
    term, scale = normal(5, 2, 3, 1, seed=6), torch.arange(5.0)
    kept_term, kept_scale = dataclasses.replace(full_state(), drift=(term, scale))[[3, 1]].drift
    assert torch.equal(kept_term, term[[3, 1]])
    assert torch.equal(kept_scale, scale[[3, 1]])


def test_slicing_a_state_keeps_a_common_drift_scale():
    term = normal(5, 2, 3, 1, seed=6)
    kept_term, kept_scale = dataclasses.replace(full_state(), drift=(term, 0.3))[[3, 1]].drift
    assert torch.equal(kept_term, term[[3, 1]]) and kept_scale == 0.3


class Keep(Hook):
    """Drops all but some particles at one moment of one level."""

    def __init__(self, moment, step, rows):
        setattr(self, moment, lambda state, info: state[rows] if state.step == step else state)


@each_kernel
@pytest.mark.parametrize("moment", ["before_ode", "after_mcmc", "before_renoise"])
def test_survivors_of_slicing_go_on_as_if_nothing_had_happened(chain, moment):
    survivors = run(settings(chain), [Keep(moment, 2, [3, 1])])
    assert survivors.ids == [3, 1]
    assert_same(survivors, run(settings(chain)), [3, 1], exact=False)


# --- Switches --------------------------------------------------------------------------------------------------------


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
    term = DataTerm(prior, operator.objective(y), settings())
    loss, gradient = term(z.detach(), True)
    torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(term(z.detach(), False)[0], loss) and term(z.detach(), False)[1] is None


@pytest.mark.parametrize("clamp", [0.5, 1.0])
def test_gradient_clamp_bounds_each_element_of_the_latent_gradient(clamp):
    decoder = MatrixAutoencoder(normal(3, 3, seed=8))
    prior, operator = gaussian_prior(PRIOR_MEAN, 1.0, decoder), MatrixOperator(MATRIX)
    objective, z = operator.objective(measurement().expand(4, 2)), latent(normal(4, 3, seed=9))
    free = DataTerm(prior, objective, settings())(z, True)[1]
    clamped = DataTerm(prior, objective, settings(gradient_clamp=clamp))(z, True)[1]
    assert free.abs().max() > clamp > free.abs().min()
    assert torch.equal(clamped, free.clamp(-clamp, clamp))


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
