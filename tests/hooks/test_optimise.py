"""The optimiser alone: AdamW for each particle, and when each of them stops."""

import pytest
import torch
from analytic import F64, MatrixOperator, normal
from optimization_support import IDENTITY, NEVER, PIXELS, how, numbers, optimizer, standing

from particledaps.particles.descent import DescentSettings, Moments, adamw_step, optimise

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
    hook = optimizer(PIXELS, Uphill(IDENTITY), how(window=7), NEVER)
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


def test_a_loss_that_is_not_a_number_stops():
    class Broken(Bowls):
        def __call__(self, z, rows):
            loss, gradient = super().__call__(z, rows)
            return torch.where(rows == 1, torch.nan, loss), gradient

    bowls = Broken(numbers(1.0, 1.0), numbers(0.0, 0.0)[:, None], numbers(0.0, 0.0))
    outcome = optimise(numbers(3.0, 3.0)[:, None], bowls, numbers(NEVER, NEVER), how(max_iters=5))
    assert outcome.reason == ["max_iters", "diverged"] and outcome.iterations.tolist() == [5, 0]


def test_an_iteration_waits_for_the_device_once(monkeypatch):
    """On a GPU each number that is read makes the host wait."""
    reads, names = [], ("__bool__", "item", "tolist", "__float__", "__int__")
    for name in names:
        original = getattr(torch.Tensor, name)

        def read(self, *rest, original=original, name=name):
            reads.append(name)
            return original(self, *rest)

        monkeypatch.setattr(torch.Tensor, name, read)
    settings = DescentSettings(lr=1e-3, max_iters=25, window=1000, weight_decay=0.0)
    outcome = optimise(torch.ones(3, 2), lambda z, rows: (z.square().sum(1) + 1, 2 * z), torch.zeros(3), settings)
    assert outcome.reason == ["max_iters"] * 3
    assert reads == ["__bool__"] * 25
