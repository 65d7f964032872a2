"""Posterior optimisation between the rounds of restarts."""

import numpy as np
import pytest
import torch
from analytic import MatrixOperator, normal
from omegaconf import OmegaConf
from sampler_support import MATRIX, PRIOR_COVARIANCE, PRIOR_MEAN, Y, measurement, problem

from particledaps.checks import SettingsError
from particledaps.particles.descent import DescentSettings, polish
from particledaps.settings.command_line import compose_config
from plan import validate

SIGMA, TAU = 0.3, 0.5
SETTINGS = DescentSettings(lr=0.02, max_iters=3000, weight_decay=0.0, prior_sigma=SIGMA, tau=TAU)


def start(count):
    prior = problem()[0]
    return normal(count, *prior.latent_shape, seed=3), measurement().expand(count, *measurement().shape[1:])


def test_polish_ends_at_the_mode_of_the_smoothed_posterior():
    prior, operator = problem()
    z, y = start(3)
    precision = np.linalg.inv(PRIOR_COVARIANCE.numpy() + SIGMA**2 * np.eye(3))
    mode = np.linalg.solve(precision + MATRIX.T @ MATRIX / TAU**2, precision @ PRIOR_MEAN + MATRIX.T @ Y / TAU**2)
    moved = polish(z, y, prior, operator, SETTINGS).reshape(3, -1).numpy()
    np.testing.assert_allclose(moved, np.tile(mode, (3, 1)), atol=0.01)


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
        ("restart_rule=best", "restart_rule=best: allowed are loss, posterior"),
    ],
)
def test_wrong_keys_are_named(override, message):
    with pytest.raises(SettingsError, match="restart") as caught:
        validate(OmegaConf.to_object(compose_config("config", ["model=cats64", override])))
    assert message in str(caught.value)
