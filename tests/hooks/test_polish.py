"""Posterior optimisation between the rounds of restarts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from analytic import MatrixOperator, normal
from omegaconf import OmegaConf
from sampler_support import MATRIX, PRIOR_COVARIANCE, PRIOR_MEAN, Y, measurement, problem

from particledaps.checks import SettingsError
from particledaps.particles.descent import DescentSettings, ParticleObjective, optimise, polish
from particledaps.particles.lbfgs import LBFGS, LONGEST
from particledaps.settings.command_line import compose_config
from run_settings import validate

SIGMA, TAU = 0.3, 0.5
SETTINGS = DescentSettings(lr=0.02, max_iters=3000, weight_decay=0.0, prior_sigma=SIGMA, tau=TAU)


def start(count):
    prior = problem()[0]
    return normal(count, *prior.latent_shape, seed=3), measurement().expand(count, *measurement().shape[1:])


def test_polish_ends_at_the_mode_of_the_smoothed_posterior():
    prior, operator = problem()
    z, y = start(3)
    moved = polish(z, y, prior, operator, SETTINGS).reshape(3, -1).numpy()
    np.testing.assert_allclose(moved, np.tile(mode_of_the_posterior(), (3, 1)), atol=0.01)


def mode_of_the_posterior():
    precision = np.linalg.inv(PRIOR_COVARIANCE.numpy() + SIGMA**2 * np.eye(3))
    return np.linalg.solve(precision + MATRIX.T @ MATRIX / TAU**2, precision @ PRIOR_MEAN + MATRIX.T @ Y / TAU**2)


def test_lbfgs_is_there_in_few_iterations_each_particle_on_its_own():
    prior, operator = problem()
    z, y = start(3)
    settings = replace(SETTINGS, method="lbfgs", max_iters=40)
    moved = polish(z, y, prior, operator, settings)
    np.testing.assert_allclose(moved.reshape(3, -1), np.tile(mode_of_the_posterior(), (3, 1)), atol=1e-6)
    for i in range(3):
        torch.testing.assert_close(polish(z[i : i + 1], y[:1], prior, operator, settings), moved[i : i + 1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_lbfgs_stays_at_the_minimum(count):
    """There the differences of gradients are their rounding, of any curvature."""
    prior, operator = problem()
    z, y = start(count)
    moved = polish(z, y, prior, operator, replace(SETTINGS, method="lbfgs", max_iters=400))
    np.testing.assert_allclose(moved.reshape(count, -1), np.tile(mode_of_the_posterior(), (count, 1)), atol=1e-6)


def test_a_particle_stops_where_it_gains_no_more():
    prior, operator = problem()
    z, y = start(3)
    z[0] = torch.from_numpy(mode_of_the_posterior()).reshape(z[0].shape)
    settings = replace(SETTINGS, method="lbfgs", max_iters=60, gain=1e-4)
    found = optimise(z, ParticleObjective(prior, operator, y, settings), z.new_zeros(3), settings, with_change=True)
    assert found.reason == ["gain"] * 3 and found.iterations[0] == 5
    assert found.iterations[1:].min() > 5 and found.iterations.max() < 40
    np.testing.assert_allclose(found.z.reshape(3, -1), np.tile(mode_of_the_posterior(), (3, 1)), atol=0.02)
    assert found.change[0].abs() < 1e-9 and (found.change[1:] < -0.1).all()


def test_lbfgs_takes_no_step_from_negative_curvature():
    """Of -x^2 the difference of gradients points the other way: a step along the gradient, no longer than allowed."""
    stepper, z = LBFGS(0.03), torch.tensor([[1.0]])
    for _ in range(5):
        moved = stepper.step(z, -2 * z)
        assert 0 < moved - z <= LONGEST + 1e-6
        z = moved


class Fenced(MatrixOperator):
    """Infinite loss for the second particle, wherever it goes."""

    def loss(self, x, y):
        losses = super().loss(x, y)
        return torch.where(torch.arange(len(losses)) == 1, torch.inf, losses)


def test_a_particle_whose_loss_is_lost_stays_where_it_was():
    z, y = start(3)
    moved = polish(z, y, problem()[0], Fenced(MATRIX), SETTINGS)
    assert [torch.equal(a, b) for a, b in zip(moved, z, strict=True)] == [False, True, False]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("restart_polish=30", "restart_polish=30: polishing is posterior optimisation; it needs"),
        ("restart_sigmas=[]", "restart_sigmas=[]: must name at least one sigma"),
        ("restart_sigmas=[2,0]", "restart_sigmas=0"),
        ("optimization_method=lbfgs", "they act beside the prior; set optimization_prior_sigma > 0"),
        ("optimization_gain=1", "they act beside the prior; set optimization_prior_sigma > 0"),
        ("restart_rule=best", "restart_rule=best: allowed are loss, posterior"),
    ],
)
def test_wrong_keys_are_named(override, message):
    with pytest.raises(SettingsError, match="restart|optimization") as caught:
        validate(OmegaConf.to_object(compose_config("config", ["model=cats64", override])))
    assert message in str(caught.value)
