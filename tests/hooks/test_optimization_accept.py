"""Which optimised answers are kept: the loss, the floor and the split rule."""

import dataclasses

import numpy as np
import pytest
import torch
from analytic import MatrixOperator, normal, prior_of
from optimization_support import IDENTITY, NEVER, PIXELS, how, numbers, one_call, optimizer, standing

from particledaps.operators.operator import Halves, NoiseFloor
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.particles.descent import ParticleObjective, optimise
from particledaps.priors.autoencoder import IdentityAutoencoder


def test_loss_rule_keeps_what_lowers_the_loss():
    """AdamW's first step is lr in every coordinate: from 0.3 to 0.2, or from 0.3 past the answer to -0.7."""
    for lr, accepted in ((0.1, True), (1.0, False)):
        state, info = standing(numbers(0.3, 0.3), numbers(0.0, 0.0))
        hook = optimizer(PIXELS, MatrixOperator(IDENTITY), how(lr=lr, max_iters=1, weight_decay=0), NEVER)
        after, row = one_call(hook, state, info)
        expected = 0.3 - lr if accepted else 0.3
        np.testing.assert_allclose(after.z0_y.flatten(), [expected, expected], rtol=1e-6)
        assert row["accepted"] == [accepted] and row["iterations"] == [1]
        assert row["initial_loss"] == pytest.approx([0.18])
        assert row["final_loss"] == pytest.approx([2 * expected**2], rel=1e-5)
    assert torch.equal(after.z0_y, state.z0_y)


@pytest.mark.parametrize(("start", "accepted"), [(1.1, False), (3.0, True)])
def test_floor_rule_keeps_what_comes_nearer_to_the_expected_loss(start, accepted):
    """Expected 1: the loss 1.21 falls to 0.01, further from it; the loss 9 falls to 4, then to 1."""
    state, info = standing(numbers(start, 0.0), numbers(0.0, 0.0))
    rule = how(lr=1.0, max_iters=2, weight_decay=0, accept="floor")
    after, row = one_call(optimizer(PIXELS, MatrixOperator(IDENTITY), rule, 1.0), state, info)
    assert row["accepted"] == [accepted]
    assert torch.equal(after.z0_y, state.z0_y) is not accepted
    state, info = standing(numbers(start, 0.0), numbers(0.0, 0.0))
    by_loss = optimizer(PIXELS, MatrixOperator(IDENTITY), dataclasses.replace(rule, accept="loss"), 1.0)
    assert one_call(by_loss, state, info)[1]["accepted"] == [True]


class TwoCopies(MatrixOperator):
    """Two readings of every number."""

    def __call__(self, x):
        return super().__call__(x).repeat(1, 2)

    def split(self, y):
        first, second = y.chunk(2, dim=1)
        floor = y.new_full((len(y),), y[0].numel() * self.noise_sigma**2)
        return Halves(first.repeat(1, 2), second.repeat(1, 2), floor)

    def noise_floor(self, y):
        return NoiseFloor(y.new_full((len(y),), 100.0), y.new_zeros(len(y)))


TRUTH = numbers(0.4, -0.7)
READINGS = torch.cat([TRUTH + numbers(0.3, 0.0), TRUTH + numbers(0.0, 0.1)])


@pytest.mark.parametrize(
    ("start", "accepted"), [(TRUTH, False), (TRUTH + numbers(2.0, -1.0), True)], ids=["noise", "improvement"]
)
def test_split_rule_rejects_a_fit_of_the_noise_alone(start, accepted):
    """From the truth, the fit of one reading moves to its noise and away from the other reading."""
    state, info = standing(start, READINGS)
    rule = how(accept="split", max_iters=200, lr=0.02, window=300, weight_decay=0)
    after, row = one_call(optimizer(PIXELS, TwoCopies(IDENTITY), rule, NEVER), state, info)
    assert row["accepted"] == [accepted]
    if accepted:
        np.testing.assert_allclose(after.z0_y.flatten(), READINGS[:2], atol=0.02)  # it saw the first reading only
    else:
        assert torch.equal(after.z0_y, state.z0_y)
        state, info = standing(start, READINGS)
        rule = dataclasses.replace(rule, accept="loss", max_iters=2)
        assert one_call(optimizer(PIXELS, TwoCopies(IDENTITY), rule, NEVER), state, info)[1]["accepted"] == [True]


def test_split_rule_stops_at_the_floor_of_one_copy():
    """Loss of the fit falls along a line; its floor is 4 sigma^2 plus what was expected above the noise floor."""
    operator, excess = TwoCopies(IDENTITY, noise_sigma=0.1), 0.08

    def fit(max_iters):
        state, info = standing(READINGS[:2] + numbers(1.0, 1.0), READINGS)
        rule = how(accept="split", max_iters=max_iters, lr=0.01, weight_decay=0)
        after, row = one_call(optimizer(PIXELS, operator, rule, 100.0 + excess), state, info)
        return 2 * (after.z0_y.flatten() - READINGS[:2]).square().sum().item(), row

    loss, row = fit(400)
    assert row["reason"] == ["floor"] and loss <= 4 * 0.1**2 + excess
    loss, row = fit(row["iterations"][0] - 1)
    assert row["reason"] == ["max_iters"] and loss > 4 * 0.1**2 + excess


def phase_problem():
    """Pixels of 8 x 8 images: the truth, and the start with some error of its own."""
    operator, truth = PhaseRetrieval(noise_sigma=0.05), 0.8 * normal(1, 1, 8, 8, seed=2).tanh()
    y = operator.measure(truth, torch.Generator().manual_seed(3))
    return operator, truth, y


def phase_state(x, y):
    state, info = standing(numbers(0.0, 0.0), numbers(0.0, 0.0), count=len(x))
    return dataclasses.replace(state, z0_y=x, z0_hat=x, z=x, y=y.expand(len(x), *y.shape[1:])), info


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_split_rule_on_phase_retrieval(error):
    """The truth itself fits one half better and the other worse; an image with errors gains on both."""
    operator, truth, y = phase_problem()
    start = truth + error * normal(1, 1, 8, 8, seed=4)
    state, info = phase_state(start, y)
    rule = how(accept="split", max_iters=150, lr=0.01, window=200, weight_decay=0)
    pixels = prior_of(None, (1, 8, 8), IdentityAutoencoder())
    after, row = one_call(optimizer(pixels, operator, rule, NEVER), state, info)
    assert row["accepted"] == [error > 0]
    assert row["initial_loss"] == pytest.approx(operator.loss(start, y).tolist())
    if error:
        clean = operator(truth)
        assert operator.loss(after.z0_y, clean) < 0.2 * operator.loss(start, clean)
        assert row["final_loss"] == pytest.approx(operator.loss(after.z0_y, y).tolist())
    else:
        fitted = optimise(start, ParticleObjective(pixels, operator, y, rule), numbers(NEVER), rule).z
        assert operator.loss(fitted, y) < operator.loss(start, y)  # the loss of all of y calls it an improvement
        assert torch.equal(after.z0_y, start)
        assert row["final_loss"] == row["initial_loss"]


def test_an_operator_without_halves_cannot_split():
    state, info = standing(numbers(3.0, 0.0), numbers(0.0, 0.0))
    hook = optimizer(PIXELS, MatrixOperator(IDENTITY), how(max_iters=2, accept="split"), 1.0)
    with pytest.raises(ValueError, match="cannot split"):
        hook.at_end(state, info)


def test_particles_are_accepted_one_by_one():
    state, info = standing(torch.stack([numbers(0.3, 0.3), numbers(5.0, 5.0)]), numbers(0.0, 0.0), count=2)
    hook = optimizer(PIXELS, MatrixOperator(IDENTITY), how(lr=1.0, max_iters=1, weight_decay=0), NEVER)
    after, row = one_call(hook, state, info)
    assert row["accepted"] == [False, True]
    assert torch.equal(after.z0_y[0], state.z0_y[0])
    np.testing.assert_allclose(after.z0_y[1].flatten(), [4.0, 4.0], rtol=1e-6)
