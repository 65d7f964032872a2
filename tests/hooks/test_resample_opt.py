import dataclasses

import numpy as np
import pytest
import torch
from analytic import F64, MatrixAutoencoder, MatrixOperator, gaussian_prior, normal, prior_of
from sampler_support import (
    LEVELS,
    MATRIX,
    PRIOR_COVARIANCE,
    PRIOR_MEAN,
    SIGMA_MAX,
    SIGMA_MIN,
    Recorder,
    Y,
    assert_same,
    loop,
    measurement,
    problem,
    run,
    settings,
)

from diffusion.paths import edm_path
from operators.operator import Halves, NoiseFloor, Symmetry
from operators.phase_retrieval import PhaseRetrieval
from priors.autoencoder import IdentityAutoencoder
from pruning import Pruning, PruningSettings
from resample_opt import LatentOptimization, Moments, OptimizationSettings, ParticleObjective, adamw_step, optimise
from runs.rng import ParticleStreams
from sampler import Info, LatentDAPS

NEVER = -float("inf")
PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)


def how(**changes):
    return OptimizationSettings(**({"from_level": 0, "accept": "loss", "lr": 0.05, "max_iters": 40} | changes))


# --- AdamW -----------------------------------------------------------------------------------------------------------


def torch_adamw(z, gradient_of, iterations, lr, weight_decay):
    leaf = z.clone().requires_grad_(True)
    optimiser = torch.optim.AdamW([leaf], lr=lr, weight_decay=weight_decay)
    for _ in range(iterations):
        leaf.grad = gradient_of(leaf.detach())
        optimiser.step()
    return leaf.detach()


def rosenbrock_gradient(z):
    x, y = z[:, 0], z[:, 1]
    return torch.stack([-2 * (1 - x) - 40 * x * (y - x**2), 20 * (y - x**2)], dim=1)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2, 3.0])
@pytest.mark.parametrize("lr", [5e-3, 0.1])
def test_adamw_is_that_of_torch(lr, weight_decay):
    start = normal(5, 2, 3)
    z, moments = start, Moments(torch.zeros_like(start), torch.zeros_like(start))
    for iteration in range(1, 301):
        z = adamw_step(z, rosenbrock_gradient(z), moments, iteration, lr, weight_decay)
        if iteration in (1, 2, 10, 300):
            expected = torch_adamw(start, rosenbrock_gradient, iteration, lr, weight_decay)
            torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-11)


# --- Stopping --------------------------------------------------------------------------------------------------------


class Bowls:
    """Particle i: ``c_i |z - a_i|^2 + b_i``; remembers who was asked for."""

    def __init__(self, curvatures, centres, offsets):
        self.curvatures, self.centres, self.offsets = curvatures, centres, offsets
        self.rows = []

    def __call__(self, z, rows):
        self.rows.append(rows.tolist())
        distance = (z - self.centres[rows]).flatten(1)
        curvature = self.curvatures[rows]
        return curvature * distance.square().sum(1) + self.offsets[rows], (2 * curvature[:, None] * distance).view_as(z)

    def of(self, i):
        return Bowls(*(v[i : i + 1] for v in (self.curvatures, self.centres, self.offsets)))


class Scripted:
    """Loss of particle i at iteration k is ``losses[i][k]``, wherever it stands; the gradient is all ones."""

    def __init__(self, *losses):
        self.losses, self.calls = losses, 0

    def __call__(self, z, rows):
        self.calls += 1
        return z.new_tensor([self.losses[i][self.calls - 1] for i in rows.tolist()]), torch.ones_like(z)


def numbers(*values):
    return torch.tensor(values, dtype=F64)


THREE = (numbers(1.0, 0.01, 300.0), normal(3, 4, 1, 1, seed=1), numbers(0.0, 5.0, 0.1))
STARTS = normal(3, 4, 1, 1, seed=2) * numbers(0.1, 5.0, 1.0).reshape(3, 1, 1, 1)
FLOORS = numbers(0.5, NEVER, 0.2)


def test_a_batch_of_three_is_three_runs_of_one():
    run_settings = how(max_iters=60, window=20, lr=0.1, weight_decay=0.5)
    together = optimise(STARTS, Bowls(*THREE), FLOORS, run_settings)
    assert sorted(set(together.reason)) == ["floor", "max_iters", "plateau"]
    assert len(set(together.iterations.tolist())) == 3
    for i in range(3):
        alone = optimise(STARTS[i : i + 1], Bowls(*THREE).of(i), FLOORS[i : i + 1], run_settings)
        torch.testing.assert_close(together.z[i : i + 1], alone.z, rtol=1e-13, atol=1e-13)
        assert together.iterations[i] == alone.iterations[0] and together.reason[i] == alone.reason[0]


def test_every_particle_stands_where_adamw_of_torch_leaves_it_after_its_own_iterations():
    """So one that stopped does not move any more, and its count is right."""
    outcome = optimise(STARTS, Bowls(*THREE), FLOORS, how(max_iters=60, window=20, lr=0.1, weight_decay=0.5))
    for i, taken in enumerate(outcome.iterations.tolist()):
        curvature, centre = THREE[0][i], THREE[1][i : i + 1]
        expected = torch_adamw(STARTS[i : i + 1], lambda z, c=curvature, a=centre: 2 * c * (z - a), taken, 0.1, 0.5)
        torch.testing.assert_close(outcome.z[i : i + 1], expected, rtol=1e-10, atol=1e-10)


def test_stopped_particles_are_not_computed():
    bowls = Bowls(*THREE)
    outcome = optimise(STARTS, bowls, FLOORS, how(max_iters=60, window=20, lr=0.1, weight_decay=0.5))
    for i, (taken, reason) in enumerate(zip(outcome.iterations.tolist(), outcome.reason, strict=True)):
        asked = [k for k, rows in enumerate(bowls.rows) if i in rows]
        assert asked == list(range(taken if reason == "max_iters" else taken + 1))


def test_floor_is_reached_at_the_first_loss_that_is_not_above_it():
    script = [[9.0, 5.0, 3.0, 2.0, 1.0], [9.0, 5.0, 3.0, 2.0, 1.0], [2.0] * 5, [9.0] * 5]
    outcome = optimise(normal(4, 2), Scripted(*script), numbers(3.0, 2.9, 2.0, 0.0), how(max_iters=5))
    assert outcome.iterations.tolist() == [2, 3, 0, 5]
    assert outcome.reason == ["floor", "floor", "floor", "max_iters"]


def test_a_particle_at_its_floor_does_not_move_at_all():
    start = normal(1, 2)
    assert torch.equal(optimise(start, Scripted([1.0]), numbers(1.0), how()).z, start)


def test_plateau_looks_one_window_back():
    """|k - 30| with a window of 10: equal at 35, higher at 36."""
    losses = [[float(abs(k - 30)) for k in range(60)], [float(abs(k - 12)) for k in range(60)], [1.0] * 60]
    start = normal(3, 2)
    outcome = optimise(start, Scripted(*losses), numbers(*[NEVER] * 3), how(max_iters=60, window=10, weight_decay=0))
    assert outcome.iterations.tolist() == [36, 18, 60]
    assert outcome.reason == ["plateau", "plateau", "max_iters"]
    moved = (start - outcome.z) / 0.05  # a constant gradient moves by lr an iteration
    expected = outcome.iterations[:, None].expand(3, 2).to(F64)
    torch.testing.assert_close(moved, expected, rtol=1e-6, atol=0)


def test_plateau_is_not_the_best_loss_so_far():
    """A window slides: a loss above the best one, but below that of a window ago, goes on."""
    losses = [10.0, 9.0, 1.0, 8.0, 7.0, 0.5, 6.0, 5.0, 0.4]
    outcome = optimise(normal(1, 2), Scripted(losses), numbers(NEVER), how(max_iters=9, window=3))
    assert (outcome.reason, outcome.iterations.tolist()) == (["max_iters"], [9])


def test_a_rising_loss_stops_after_one_window_and_is_not_accepted():
    """The floor operator's gradient points uphill."""

    class Uphill(MatrixOperator):
        def objective(self, y):
            plain = super().objective(y)

            def evaluate(x):
                loss, gradient = plain(x)
                return loss, -gradient

            return evaluate

    state, info = standing(numbers(0.3, -0.2), numbers(0.0, 0.0))
    hook = LatentOptimization(PIXELS, Uphill(IDENTITY), how(window=7), NEVER)
    after = hook.at_end(state, info)
    (row,) = info.rows["optimization"]
    assert row["iterations"] == [7] and row["reason"] == ["plateau"] and row["accepted"] == [False]
    assert torch.equal(after.z0_y, state.z0_y)


@pytest.mark.parametrize("max_iters", [1, 2, 17])
def test_max_iters_counts_steps(max_iters):
    bowls = Bowls(*THREE)
    outcome = optimise(STARTS, bowls, numbers(*[NEVER] * 3), how(max_iters=max_iters))
    assert outcome.iterations.tolist() == [max_iters] * 3 and len(bowls.rows) == max_iters
    assert outcome.reason == ["max_iters"] * 3


def test_a_nan_loss_stays_with_its_particle():
    curvatures = numbers(1.0, float("nan"), 300.0)
    hurt = optimise(STARTS, Bowls(curvatures, *THREE[1:]), FLOORS, how())
    well = optimise(STARTS, Bowls(*THREE), FLOORS, how())
    assert torch.equal(hurt.z[[0, 2]], well.z[[0, 2]]) and hurt.iterations[2] == well.iterations[2]


# --- Accepting -------------------------------------------------------------------------------------------------------

IDENTITY = torch.eye(2, dtype=F64)
PIXELS = prior_of(None, (2, 1, 1), IdentityAutoencoder())


def standing(z0_y, y, count=1, level=LEVELS - 1):
    """A state after its last level with these answers, and a place to log."""
    start = loop(settings()).start(measurement(), ParticleStreams(42, 0), range(count))
    z0_y = z0_y.expand(count, 2) if z0_y.ndim == 1 else z0_y
    y = y.expand(len(z0_y), len(y))
    answers = z0_y.reshape(-1, 2, 1, 1)
    levels = torch.full((count,), level + 1)
    return dataclasses.replace(start, z0_y=answers, z0_hat=answers, y=y, step=level, level=levels), Info()


def one_call(hook, state, info, moment="at_end"):
    after = getattr(hook, moment)(state, info)
    (row,) = info.rows["optimization"]
    return after, row


def test_loss_rule_keeps_what_lowers_the_loss():
    """AdamW's first step is lr in every coordinate: from 0.3 to 0.2, or from 0.3 past the answer to -0.7."""
    for lr, accepted in ((0.1, True), (1.0, False)):
        state, info = standing(numbers(0.3, 0.3), numbers(0.0, 0.0))
        hook = LatentOptimization(PIXELS, MatrixOperator(IDENTITY), how(lr=lr, max_iters=1, weight_decay=0), NEVER)
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
    after, row = one_call(LatentOptimization(PIXELS, MatrixOperator(IDENTITY), rule, 1.0), state, info)
    assert row["accepted"] == [accepted]
    assert torch.equal(after.z0_y, state.z0_y) is not accepted
    state, info = standing(numbers(start, 0.0), numbers(0.0, 0.0))
    by_loss = LatentOptimization(PIXELS, MatrixOperator(IDENTITY), dataclasses.replace(rule, accept="loss"), 1.0)
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
    after, row = one_call(LatentOptimization(PIXELS, TwoCopies(IDENTITY), rule, NEVER), state, info)
    assert row["accepted"] == [accepted]
    if accepted:
        np.testing.assert_allclose(after.z0_y.flatten(), READINGS[:2], atol=0.02)  # it saw the first reading only
    else:
        assert torch.equal(after.z0_y, state.z0_y)
        state, info = standing(start, READINGS)
        rule = dataclasses.replace(rule, accept="loss", max_iters=2)
        assert one_call(LatentOptimization(PIXELS, TwoCopies(IDENTITY), rule, NEVER), state, info)[1]["accepted"] == [
            True
        ]


def test_split_rule_stops_at_the_floor_of_one_copy():
    """Loss of the fit falls along a line; its floor is 4 sigma^2 plus what was expected above the noise floor."""
    operator, excess = TwoCopies(IDENTITY, noise_sigma=0.1), 0.08

    def fit(max_iters):
        state, info = standing(READINGS[:2] + numbers(1.0, 1.0), READINGS)
        rule = how(accept="split", max_iters=max_iters, lr=0.01, weight_decay=0)
        after, row = one_call(LatentOptimization(PIXELS, operator, rule, 100.0 + excess), state, info)
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
    after, row = one_call(LatentOptimization(pixels, operator, rule, NEVER), state, info)
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
    hook = LatentOptimization(PIXELS, MatrixOperator(IDENTITY), how(max_iters=2, accept="split"), 1.0)
    with pytest.raises(ValueError, match="cannot split"):
        hook.at_end(state, info)


def test_a_loss_that_is_not_a_number_stops():
    class Broken(Bowls):
        def __call__(self, z, rows):
            loss, gradient = super().__call__(z, rows)
            return torch.where(rows == 1, torch.nan, loss), gradient

    bowls = Broken(numbers(1.0, 1.0), numbers(0.0, 0.0)[:, None], numbers(0.0, 0.0))
    outcome = optimise(numbers(3.0, 3.0)[:, None], bowls, numbers(NEVER, NEVER), how(max_iters=5))
    assert outcome.reason == ["max_iters", "diverged"] and outcome.iterations.tolist() == [5, 0]


def test_particles_are_accepted_one_by_one():
    state, info = standing(torch.stack([numbers(0.3, 0.3), numbers(5.0, 5.0)]), numbers(0.0, 0.0), count=2)
    hook = LatentOptimization(PIXELS, MatrixOperator(IDENTITY), how(lr=1.0, max_iters=1, weight_decay=0), NEVER)
    after, row = one_call(hook, state, info)
    assert row["accepted"] == [False, True]
    assert torch.equal(after.z0_y[0], state.z0_y[0])
    np.testing.assert_allclose(after.z0_y[1].flatten(), [4.0, 4.0], rtol=1e-6)


def test_the_gradient_goes_through_the_decoder():
    """``W M z = y`` is solved in z."""
    decoder, target = normal(2, 2, seed=8) + 2 * IDENTITY, numbers(0.5, -0.4)
    latents = prior_of(None, (2, 1, 1), MatrixAutoencoder(decoder))
    state, info = standing(torch.linalg.solve(decoder, target) + 0.3, target)
    rule = how(max_iters=600, lr=0.01, window=1000, weight_decay=0)
    after, row = one_call(LatentOptimization(latents, MatrixOperator(IDENTITY), rule, 1e-8), state, info)
    assert row["reason"] == ["floor"] and row["final_loss"][0] <= 1e-8
    np.testing.assert_allclose(decoder @ after.z0_y.flatten(), target, atol=1e-4)


@pytest.mark.parametrize("decode_batch", [1, 2])
def test_decoding_in_parts_changes_nothing(decode_batch):
    x = normal(3, 2, seed=5)
    states = []
    for batch in (None, decode_batch):
        state, info = standing(x, numbers(0.1, 0.2), count=3)
        rule, prior = how(max_iters=30, lr=0.05), dataclasses.replace(PIXELS, decode_batch=batch)
        states.append(LatentOptimization(prior, MatrixOperator(IDENTITY), rule, 1e-3).at_end(state, info))
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
    after, row = one_call(LatentOptimization(*problem(), rule, 1e9), state, Info())
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
    after, row = one_call(LatentOptimization(UNIT, MatrixOperator(IDENTITY), rule, 1.25), state, info)
    assert row["accepted"] == [True]
    np.testing.assert_allclose(after.z0_y.flatten(), y / 2, atol=0.02)


# --- In the loop -----------------------------------------------------------------------------------------------------

IDS = [0, 1, 2, 3]


def optimization(expected=1e-3, **changes):
    return LatentOptimization(*problem(), how(**changes), expected)


def optimised_run(*hooks, ids=IDS):
    info, recorder = Info(), Recorder()
    state = loop(settings(), [*hooks, recorder]).sample(measurement(), ParticleStreams(42, 0), ids, info)
    return state, info.rows.get("optimization", []), recorder.seen


@pytest.mark.parametrize("when", ["end", "every"])
def test_no_iterations_is_the_plain_run(when):
    state, rows, _ = optimised_run(optimization(when=when, max_iters=0))
    assert rows == []
    assert_same(state, run(settings()))


def test_at_the_end_it_acts_once_on_the_answer():
    state, rows, seen = optimised_run(optimization(when="end", from_level=2))
    plain, (row,) = run(settings()), rows
    assert row["particle_ids"] == IDS and all(row["accepted"])
    assert_same(dataclasses.replace(state, z0_y=plain.z0_y), plain)
    assert all(a < b for a, b in zip(row["final_loss"], row["initial_loss"], strict=True))
    operator = problem()[1]
    assert row["final_loss"] == pytest.approx(operator.loss(state.z0_y, state.y).tolist())
    assert row["initial_loss"] == pytest.approx(operator.loss(plain.z0_y, plain.y).tolist())


@pytest.mark.parametrize("from_level", range(LEVELS + 1))
def test_at_every_level_it_acts_from_its_level_on(from_level):
    _, rows, seen = optimised_run(optimization(when="every", from_level=from_level))
    plain = optimised_run()[2]
    assert [row["step"] for row in rows] == list(range(from_level, LEVELS))
    for level in range(LEVELS):
        before, after = (s["before_renoise"][level].z0_y for s in (plain, seen))
        assert torch.equal(before, after) is (level < from_level)
    if from_level < LEVELS - 1:  # the next level starts from the optimised answer
        answer, nxt = seen["before_renoise"][from_level].z0_y, seen["before_ode"][from_level + 1]
        noise = ParticleStreams(42, 0).normal(IDS, "renoise", from_level, answer)
        torch.testing.assert_close(nxt.z, answer + nxt.sigma * noise, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("moment", ["at_end", "before_renoise"])
def test_masked_and_diverged_particles_are_untouched(moment):
    state, info = standing(normal(4, 2, seed=6), numbers(0.0, 0.0), count=4, level=3)
    masked, diverged = (torch.tensor([i == row for i in range(4)]) for row in (1, 2))
    state = dataclasses.replace(state, masked=masked, diverged=diverged)
    hook = LatentOptimization(
        PIXELS, MatrixOperator(IDENTITY), how(when="end" if moment == "at_end" else "every"), NEVER
    )
    after, row = one_call(hook, state, info, moment)
    assert row["particle_ids"] == [0, 3]
    assert torch.equal(after.z0_y[[1, 2]], state.z0_y[[1, 2]])
    assert (after.z0_y[[0, 3]] != state.z0_y[[0, 3]]).all()
    alone, info = standing(state.z0_y[[0, 3]].flatten(1), numbers(0.0, 0.0), count=2, level=3)
    expected, _ = one_call(hook, alone, info, moment)
    torch.testing.assert_close(after.z0_y[[0, 3]], expected.z0_y, rtol=1e-13, atol=1e-13)


def test_nobody_left_to_optimise():
    state, info = standing(normal(2, 2), numbers(0.0, 0.0), count=2)
    state = dataclasses.replace(state, masked=torch.tensor([True, True]))
    assert LatentOptimization(PIXELS, MatrixOperator(IDENTITY), how(), NEVER).at_end(state, info) is state


def test_children_above_the_level_wait_for_their_own_turn():
    prune = Pruning(
        *problem(), PruningSettings(3, keep=1, branch_sigma=PATH[1].item(), first_child_id=4), PATH, NEVER, 1.0
    )
    state, rows, seen = optimised_run(prune, optimization(when="every", from_level=2))
    survivor = next(i for i in state.ids if i < 4)
    asked = [(row["step"], sorted(row["particle_ids"])) for row in rows]
    assert asked == [(2, IDS), (3, [survivor]), (2, [4, 5, 6]), (3, [4, 5, 6]), (4, sorted([survivor, 4, 5, 6]))]
    at_birth = seen["before_renoise"][3]
    children = [i for i, born in enumerate(at_birth.ids) if born >= 4]
    parent = seen["after_mcmc"][3]
    for child in children:  # born with the parent's answer before it was optimised
        assert torch.equal(at_birth.z0_y[child], parent.z0_y[parent.ids.index(survivor)])
    assert not torch.equal(at_birth.z0_y[at_birth.ids.index(survivor)], at_birth.z0_y[children[0]])


def test_four_particles_are_four_runs_of_one():
    together, _, _ = optimised_run(optimization(when="every", from_level=1))
    for particle in IDS:
        alone, _, _ = optimised_run(optimization(when="every", from_level=1), ids=[particle])
        assert_same(alone, together, [particle], exact=False)


def test_repeated_runs_of_one_hook_agree():
    once = LatentDAPS(*problem(), settings(), [optimization(when="every", from_level=3)])
    first, second = (once.sample(measurement(), ParticleStreams(42, 0), IDS) for _ in range(2))
    assert_same(first, second)


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


@pytest.mark.parametrize("best", [1, 2, 4])
def test_best_optimises_the_lowest_losses_and_drops_the_others(best):
    """Row 1 has the lowest loss but is masked, row 2 the next but diverged: it stays, untouched, to be reported."""
    distance = numbers(3.0, 0.1, 0.5, 1.0, 2.0)
    state, info = standing(torch.stack([distance, torch.zeros_like(distance)], 1), numbers(0.0, 0.0), count=5, level=3)
    masked, diverged = (torch.tensor([i == row for i in range(5)]) for row in (1, 2))
    state = dataclasses.replace(state, masked=masked, diverged=diverged)
    hook = LatentOptimization(PIXELS, MatrixOperator(IDENTITY), how(best=best), NEVER)
    after, row = one_call(hook, state, info, "at_end")
    lowest = sorted([3, 4, 0][:best])
    assert row["particle_ids"] == lowest
    assert after.ids == (sorted([2, *lowest]) if best < 3 else [0, 1, 2, 3, 4])
    rows = [after.ids.index(i) for i in lowest]
    everyone, _ = one_call(LatentOptimization(PIXELS, MatrixOperator(IDENTITY), how(), NEVER), state, Info(), "at_end")
    torch.testing.assert_close(after.z0_y[rows], everyone.z0_y[lowest], rtol=1e-13, atol=1e-13)


class Mirrored(MatrixOperator):
    """Measures what the sign of the first number does not change."""

    def __init__(self):
        super().__init__(IDENTITY)

    def __call__(self, x):
        return super().__call__(x).abs() * numbers(1.0, 0.0) + super().__call__(x) * numbers(0.0, 1.0)

    def symmetries(self):
        return (*super().symmetries(), Symmetry("mirror", lambda x: x * numbers(-1.0, 1.0).reshape(1, 2, 1, 1)))


def test_twins_are_optimised_beside_their_particles_as_particles_of_their_own():
    state, info = standing(torch.stack([numbers(0.3, 0.9), numbers(0.2, 0.8)], 1), numbers(0.5, 0.0), count=2, level=3)
    state = dataclasses.replace(state, diverged=torch.tensor([False, True]))
    hook = LatentOptimization(PIXELS, Mirrored(), how(twins=True, weight_decay=0.0), NEVER)
    hook.before_renoise(state, Info())
    after, row = one_call(hook, state, info, "at_end")
    assert (after.ids, after.parent_id.tolist()) == ([0, 1, 2], [-1, -1, 0])
    assert row["particle_ids"] == [0, 2]  # the diverged particle has no twin
    torch.testing.assert_close(after.z0_y[2], after.z0_y[0] * numbers(-1.0, 1.0).reshape(2, 1, 1), rtol=0, atol=1e-12)
    alone, _ = one_call(LatentOptimization(PIXELS, Mirrored(), how(weight_decay=0.0), NEVER), state, Info(), "at_end")
    torch.testing.assert_close(after.z0_y[:2], alone.z0_y, rtol=1e-13, atol=1e-13)


def test_an_operator_without_symmetries_has_no_twins():
    state, info = standing(numbers(0.3, 0.9), numbers(0.0, 0.0))
    hook = LatentOptimization(PIXELS, MatrixOperator(IDENTITY), how(twins=True), NEVER)
    assert one_call(hook, state, info, "at_end")[0].ids == [0]
