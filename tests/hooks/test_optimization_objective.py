"""What is optimised: data consistency through the decoder, alone or with the prior."""

import dataclasses

import numpy as np
import pytest
import torch
from analytic import F64, MatrixAutoencoder, MatrixOperator, gaussian_prior, normal, prior_of
from optimization_support import IDENTITY, PIXELS, how, numbers, one_call, optimizer, standing
from sampler_support import MATRIX, PRIOR_COVARIANCE, PRIOR_MEAN, Y, assert_same, loop, measurement, problem, settings

from particledaps.particles.descent import ParticleObjective, optimise
from particledaps.streams import ParticleStreams
from sampler import Info

# --- Accepting -------------------------------------------------------------------------------------------------------


def test_the_gradient_goes_through_the_decoder():
    """``W M z = y`` is solved in z."""
    decoder, target = normal(2, 2, seed=8) + 2 * IDENTITY, numbers(0.5, -0.4)
    latents = prior_of(None, (2, 1, 1), MatrixAutoencoder(decoder))
    state, info = standing(torch.linalg.solve(decoder, target) + 0.3, target)
    rule = how(max_iters=600, lr=0.01, window=1000, weight_decay=0)
    after, row = one_call(optimizer(latents, MatrixOperator(IDENTITY), rule, 1e-8), state, info)
    assert row["reason"] == ["floor"] and row["final_loss"][0] <= 1e-8
    np.testing.assert_allclose(decoder @ after.z0_y.flatten(), target, atol=1e-4)


@pytest.mark.parametrize("decode_batch", [1, 2])
def test_decoding_in_parts_changes_nothing(decode_batch):
    x = normal(3, 2, seed=5)
    states = []
    for batch in (None, decode_batch):
        state, info = standing(x, numbers(0.1, 0.2), count=3)
        rule, prior = how(max_iters=30, lr=0.05), dataclasses.replace(PIXELS, decode_batch=batch)
        states.append(optimizer(prior, MatrixOperator(IDENTITY), rule, 1e-3).at_end(state, info))
    assert_same(*states, exact=False)
    assert not torch.equal(states[0].z0_y.flatten(1), x)


# --- The posterior as the objective ----------------------------------------------------------------------------------


def objective_by_hand(z, prior_sigma, tau):
    """Gradient of ``|W z - y|^2 / 2 tau^2 - log N(z; m, S + sigma^2 I)``, and the data loss, a particle a row."""
    precision = np.linalg.inv(PRIOR_COVARIANCE.numpy() + prior_sigma**2 * np.eye(3))
    rows = z.flatten(1).numpy()
    residual = rows @ MATRIX.T - Y
    return residual @ MATRIX / tau**2 + (rows - PRIOR_MEAN) @ precision, (residual**2).sum(1)


@pytest.mark.parametrize("prior_sigma", [0.2, 1.5])
def test_prior_sigma_makes_the_objective_a_posterior(prior_sigma):
    z = normal(4, 3, 1, 1, seed=7)
    rule = how(prior_sigma=prior_sigma, tau=0.3)
    objective = ParticleObjective(*problem(), measurement().expand(4, 2), rule)
    for rows in (torch.arange(4), torch.tensor([1, 3])):
        loss, gradient = objective(z[rows], rows)
        expected_gradient, expected_loss = objective_by_hand(z[rows], prior_sigma, 0.3)
        np.testing.assert_allclose(gradient.flatten(1), expected_gradient, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-10)


def test_without_prior_the_objective_is_the_mean_loss():
    z, measured = normal(4, 3, 1, 1, seed=7), measurement() + normal(4, 2, seed=8)
    for rows in (torch.arange(4), torch.tensor([1, 3])):
        loss, gradient = ParticleObjective(*problem(), measured, how())(z[rows], rows)
        residual = z[rows].flatten(1) @ torch.from_numpy(MATRIX).T - measured[rows]
        torch.testing.assert_close(loss, residual.square().sum(1), rtol=1e-10, atol=0)
        torch.testing.assert_close(gradient.flatten(1), residual @ torch.from_numpy(MATRIX), rtol=1e-9, atol=1e-12)


def test_posterior_objective_ends_at_the_mode_whatever_the_floor():
    """``sigma`` = 0.2: the mode of a Gaussian is known; a floor of 1e9 would stop data consistency at once."""
    rule = how(prior_sigma=0.2, tau=0.9, max_iters=1500, window=2000, lr=0.02, weight_decay=0)
    start = loop(settings()).start(measurement(), ParticleStreams(42, 0), range(2))
    state = dataclasses.replace(start, z0_y=normal(2, 3, 1, 1, seed=9))
    after, row = one_call(optimizer(*problem(), rule, 1e9), state, Info())
    assert row["reason"] == ["max_iters"] * 2 and row["iterations"] == [1500] * 2 and all(row["accepted"])
    precision = np.linalg.inv(PRIOR_COVARIANCE.numpy() + 0.2**2 * np.eye(3))
    mode = np.linalg.solve(MATRIX.T @ MATRIX / 0.9**2 + precision, MATRIX.T @ Y / 0.9**2 + precision @ PRIOR_MEAN)
    np.testing.assert_allclose(after.z0_y.flatten(1), [mode, mode], atol=1e-3)


# N(0, 1) in both coordinates once 0.2^2 is added: the mode given one reading y is y / (1 + tau^2).
UNIT = gaussian_prior(np.zeros(2), 1 - 0.2**2)


def test_window_lets_a_falling_posterior_objective_go_on():
    y = numbers(1.0, -2.0)
    state, info = standing(y, y)
    rule = how(accept="floor", prior_sigma=0.2, tau=1.0, max_iters=1500, window=20, lr=0.01, weight_decay=0)
    after, row = one_call(optimizer(UNIT, MatrixOperator(IDENTITY), rule, 1.25), state, info)
    assert row["accepted"] == [True]
    np.testing.assert_allclose(after.z0_y.flatten(), y / 2, atol=0.02)


# --- In the loop -----------------------------------------------------------------------------------------------------


def test_change_of_the_objective_is_its_difference():
    y, z = measurement().expand(3, 2), normal(3, 3, 1, 1, seed=4)
    rule = how(max_iters=400, lr=2e-3, weight_decay=0, prior_sigma=0.2, tau=0.5)
    objective = ParticleObjective(*problem(), y, rule)
    outcome = optimise(z, objective, torch.full((3,), -torch.inf, dtype=F64), rule)
    precision = np.linalg.inv(PRIOR_COVARIANCE.numpy() + 0.2**2 * np.eye(3))

    def value(x):
        rows = x.flatten(1).numpy()
        residual, offset = rows @ MATRIX.T - Y, rows - PRIOR_MEAN
        return (residual**2).sum(1) / (2 * 0.5**2) + np.einsum("pi,ij,pj->p", offset, precision, offset) / 2

    np.testing.assert_allclose(outcome.change, value(outcome.z) - value(z), rtol=1e-3)
    assert (outcome.change < 0).all()
