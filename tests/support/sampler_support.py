"""A linear-Gaussian problem for the sampler: its settings, its maps by hand, and what its tests share."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from analytic import (
    F64,
    ImpulseStreams,
    MatrixOperator,
    correlated,
    gaussian_prior,
    moments,
    normal,
    stream_chain_noise,
)

from particledaps.diffusion.mcmc import ChainSettings
from particledaps.particles import level_posterior
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams
from sampler import Hook, LatentDAPS, SamplerSettings, State

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


def impulse_response(run_settings, monkeypatch, draws_per_chain, prior_and_operator=None):
    """Mean and covariance of the sampler's answer from its own response to every unit of noise."""
    monkeypatch.setattr(level_posterior, "chain_noise", stream_chain_noise)
    prior, operator = prior_and_operator or problem()
    streams, draws = ImpulseStreams(), 1 + run_settings.num_levels * (1 + draws_per_chain)
    size = math.prod(prior.latent_shape)
    state = LatentDAPS(prior, operator, run_settings).sample(measurement(), streams, range(draws * size + 1))
    assert streams.draws == draws
    return moments(state.z0_y)


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
        "masked": rows % 3 == 0,
        "level": rows + 30,
    }
    required = {f.name for f in dataclasses.fields(State) if f.type in (torch.Tensor, "torch.Tensor")}
    assert required == set(values), "a new tensor field needs a value here"
    return State(**values, next_id=1000, streams=ParticleStreams(0, 0))
