"""Latent optimisation as a hook of the loop: when it acts, on whom, and what it leaves behind."""

import dataclasses

import pytest
import torch
from analytic import MatrixOperator, normal
from optimization_support import IDENTITY, NEVER, PIXELS, how, numbers, one_call, optimizer, standing
from sampler_support import (
    LEVELS,
    SIGMA_MAX,
    SIGMA_MIN,
    Recorder,
    assert_same,
    loop,
    measurement,
    problem,
    run,
    settings,
)

from particledaps.operators.operator import Symmetry
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams
from pruning import Pruning, Settings
from sampler import Info, LatentDAPS

PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)


IDS = [0, 1, 2, 3]


def optimization(expected=1e-3, from_level=0, **changes):
    return optimizer(*problem(), how(**changes), expected, from_level)


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
    hook = optimizer(PIXELS, MatrixOperator(IDENTITY), how(when="end" if moment == "at_end" else "every"), NEVER)
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
    assert optimizer(PIXELS, MatrixOperator(IDENTITY), how(), NEVER).at_end(state, info) is state


def test_children_above_the_level_wait_for_their_own_turn():
    prune = Pruning(*problem(), Settings(keep=1, branch=PATH[1].item()), PATH, 3)
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


@pytest.mark.parametrize("best", [1, 2, 4])
def test_best_optimises_the_lowest_losses_and_drops_the_others(best):
    """Row 1 has the lowest loss but is masked, row 2 the next but diverged: it stays, untouched, to be reported."""
    distance = numbers(3.0, 0.1, 0.5, 1.0, 2.0)
    state, info = standing(torch.stack([distance, torch.zeros_like(distance)], 1), numbers(0.0, 0.0), count=5, level=3)
    masked, diverged = (torch.tensor([i == row for i in range(5)]) for row in (1, 2))
    state = dataclasses.replace(state, masked=masked, diverged=diverged)
    hook = optimizer(PIXELS, MatrixOperator(IDENTITY), how(best=best), NEVER)
    after, row = one_call(hook, state, info, "at_end")
    lowest = sorted([3, 4, 0][:best])
    assert row["particle_ids"] == lowest
    assert after.ids == (sorted([2, *lowest]) if best < 3 else [0, 1, 2, 3, 4])
    rows = [after.ids.index(i) for i in lowest]
    everyone, _ = one_call(optimizer(PIXELS, MatrixOperator(IDENTITY), how(), NEVER), state, Info(), "at_end")
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
    hook = optimizer(PIXELS, Mirrored(), how(twins=True, weight_decay=0.0), NEVER)
    after, row = one_call(hook, state, info, "at_end")
    assert (after.ids, after.parent_id.tolist()) == ([0, 1, 2], [-1, -1, 0])
    assert row["particle_ids"] == [0, 2]  # the diverged particle has no twin
    torch.testing.assert_close(after.z0_y[2], after.z0_y[0] * numbers(-1.0, 1.0).reshape(2, 1, 1), rtol=0, atol=1e-12)
    alone, _ = one_call(optimizer(PIXELS, Mirrored(), how(weight_decay=0.0), NEVER), state, Info(), "at_end")
    torch.testing.assert_close(after.z0_y[:2], alone.z0_y, rtol=1e-13, atol=1e-13)


def test_an_operator_without_symmetries_has_no_twins():
    state, info = standing(numbers(0.3, 0.9), numbers(0.0, 0.0))
    hook = optimizer(PIXELS, MatrixOperator(IDENTITY), how(twins=True), NEVER)
    assert one_call(hook, state, info, "at_end")[0].ids == [0]
