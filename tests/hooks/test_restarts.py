import dataclasses

import pytest
import torch
from analytic import MatrixOperator
from sampler_support import (
    LEVELS,
    MATRIX,
    SIGMA_MAX,
    SIGMA_MIN,
    Recorder,
    assert_same,
    loop,
    measurement,
    problem,
    settings,
)
from symmetry_support import CPU, IMAGE, OPERATOR, SIDE, Y, image_prior, near, state_of

from particledaps.operators.symmetry_moves import conjugate_band, draw_low_band
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams
from restarts import Restarts, Settings
from sampler import Hook, Info

PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)
IDS = [0, 1, 2, 3]
MIDDLE = PATH[2].item()


def restarts(rounds=1, polish=None, energy=None, agree=None, **changes):
    values = {"keep": 1, "children": 3, "sigmas": (MIDDLE,)} | changes
    return Restarts(*problem(), Settings(rounds, **values), PATH, 8, polish, energy, agree)


def restarted_run(*hooks, ids=IDS):
    info, recorder = Info(), Recorder()
    state = loop(settings(), [*hooks, recorder]).sample(measurement(), ParticleStreams(42, 0), ids, info)
    return state, info.rows.get("restarts", []), recorder.seen


def losses(state):
    return MatrixOperator(MATRIX).loss(state.z0_y, measurement()).tolist()


def test_no_rounds_is_the_plain_run():
    plain, off = restarted_run()[0], restarted_run(restarts(rounds=0))[0]
    assert_same(off, plain)


def test_the_best_stays_bitwise_and_its_children_run_the_levels_below_sigma_again():
    plain = restarted_run()[0]
    state, (row,), seen = restarted_run(restarts())
    best = min(range(4), key=losses(plain).__getitem__)
    assert row["kept"] == [best]
    assert state.ids == [best, 8, 9, 10]
    assert state.parent_id.tolist() == [-1, best, best, best]
    assert torch.equal(state.z0_y[0], plain.z0_y[best])
    levels = [(s.step, s.ids) for s in seen["before_ode"]]
    assert levels[:LEVELS] == [(k, IDS) for k in range(LEVELS)]
    assert levels[LEVELS:] == [(k, [8, 9, 10]) for k in range(2, LEVELS)]


def test_a_child_starts_from_its_parent_under_its_own_noise():
    plain = restarted_run()[0]
    _, (row,), seen = restarted_run(restarts(keep=2, children=3))
    born = seen["before_ode"][LEVELS]
    noise = ParticleStreams(42, 0).normal([8, 9, 10], "renoise", 1, plain.z0_y)
    first, second = row["kept"]
    parents = plain.z0_y[[first, second, first]]
    torch.testing.assert_close(born.z, parents + MIDDLE * noise, rtol=1e-12, atol=1e-12)
    assert [pair["parent"] for pair in row["branched"]] == [first, second, first]


def test_parents_compete_with_their_children_so_no_round_loses_an_answer():
    previous = min(losses(restarted_run()[0]))
    for rounds in range(1, 5):
        state, rows, _ = restarted_run(restarts(rounds=rounds))
        assert min(losses(state)) <= previous
        assert len(rows) == rounds
        previous = min(losses(state))
    assert len({i for row in rows for pair in row["branched"] for i in [pair["child"]]}) == 4 * 3


@pytest.mark.parametrize(("asked", "level"), [(1e-9, LEVELS - 1), (1.01 * PATH[3].item(), 3)])
def test_the_record_names_the_sigma_that_children_really_start_at(asked, level):
    """The first of the path that is at most the one asked for, or its last."""
    _, (row,), seen = restarted_run(restarts(sigmas=(asked,)))
    assert seen["before_ode"][LEVELS].step == row["step"] == level
    assert row["sigma"] == seen["before_ode"][LEVELS].sigma == PATH[level].item()


def test_sigmas_take_turns():
    _, rows, seen = restarted_run(restarts(rounds=3, sigmas=(MIDDLE, PATH[3].item())))
    assert [row["sigma"] for row in rows] == [MIDDLE, PATH[3].item(), MIDDLE]
    starts = [s.step for s in seen["before_ode"][LEVELS:]]
    assert [k for before, k in zip([LEVELS, *starts], starts, strict=False) if k < before] == [2, 3, 2]


def test_children_have_chains_of_their_own_length():
    _, _, seen = restarted_run(restarts(rounds=2, steps=7))
    assert [s.mcmc_steps for s in seen["after_mcmc"][:LEVELS]] == [None] * LEVELS
    assert {s.mcmc_steps for s in seen["after_mcmc"][LEVELS:]} == {7}
    same, plain = (restarted_run(restarts(steps=n))[0] for n in (12, None))
    assert_same(same, plain)
    assert not torch.equal(restarted_run(restarts(steps=7))[0].z0_y[1], plain.z0_y[1])


def test_polish_comes_before_the_comparison_and_once_to_each_particle():
    polished = []

    def towards_zero(z, y):
        assert len(z) == len(y)
        polished.append(len(z))
        return 0.5 * z

    plain = restarted_run()[0]
    _, rows, _ = restarted_run(restarts(rounds=2, polish=towards_zero))
    assert polished == [4, 3, 3]
    halved = dataclasses.replace(plain, z0_y=0.5 * plain.z0_y)
    assert rows[0]["losses"] == pytest.approx(losses(halved))
    _, (row,), seen = restarted_run(restarts(polish=towards_zero, energy=lambda z, loss: -torch.arange(len(z))))
    assert row["kept"] == [3]  # the energy's favourite, as it was polished
    noise = ParticleStreams(42, 0).normal([8, 9, 10], "renoise", 1, plain.z0_y)
    torch.testing.assert_close(seen["before_ode"][LEVELS].z, halved.z0_y[[3]] + MIDDLE * noise, rtol=1e-12, atol=1e-12)


def test_particles_compete_by_the_energy_where_one_is_given():
    plain = restarted_run()[0]
    _, (row,), _ = restarted_run(restarts(energy=lambda z, loss: -loss))
    assert row["kept"] == [max(range(4), key=losses(plain).__getitem__)]
    assert row["energies"] == [-value for value in row["losses"]]


def test_a_parent_that_no_child_displaced_has_its_low_bands_turned_to_the_other_twin():
    """The first particle is always the best, so the second round has the parent of the first."""
    start, info = state_of(near(IMAGE, 2), Y), Info()
    settings = Settings(2, children=3, conjugate=2)
    hook = Restarts(image_prior(), OPERATOR, settings, PATH, energy=lambda z, loss: torch.arange(len(z)) + 0.0)
    first = hook.after_levels(start, info)
    assert torch.equal(first.z0_y[1:], first.z0_y[:1].expand(3, -1, -1, -1))
    second = hook.after_levels(first, info)
    assert [row["conjugated"] for row in info.rows["restarts"]] == [[], [1004, 1005]]
    best, plain, *turned = second.z0_y
    assert torch.equal(plain, best) and second.ids == [0, 1003, 1004, 1005]
    for child, image in zip((1004, 1005), turned, strict=True):
        (generator,) = start.streams.generators([child], "restart_band", 0, CPU)
        band = draw_low_band(SIDE, SIDE, generator)
        assert torch.equal(image, conjugate_band(best[None], band)[0].clamp(-1, 1))
        assert (image - best).abs().max() > 0.01


def test_a_new_parent_has_plain_children():
    start, info = state_of(near(IMAGE, 2), Y), Info()
    settings = Settings(2, children=3, conjugate=3)
    hook = Restarts(image_prior(), OPERATOR, settings, PATH, energy=lambda z, loss: -torch.arange(len(z)))
    second = hook.after_levels(hook.after_levels(start, info), info)
    assert [row["conjugated"] for row in info.rows["restarts"]] == [[], []]
    assert torch.equal(second.z0_y[1:], second.z0_y[:1].expand(3, -1, -1, -1))


def test_no_child_is_turned_unless_asked_for():
    (row,) = restarted_run(restarts())[1]
    assert row["conjugated"] == []


class Copy(Hook):
    """Gives every particle of a last level a new id, as resampling does."""

    def before_renoise(self, state, info):
        if state.step < LEVELS - 1:
            return state
        ids = state.next_id + torch.arange(len(state))
        return dataclasses.replace(state, particle_id=ids, parent_id=state.particle_id, next_id=int(ids[-1]) + 1)


def test_copies_that_another_hook_makes_compete_too():
    _, (first, second), _ = restarted_run(Copy(), restarts(rounds=2))
    born = {pair["child"] for pair in first["branched"]} | set(first["kept"])
    assert len(set(second["particle_ids"]) - born) == 3 and len(second["kept"]) == 1


def test_a_run_of_two_rounds_is_reproducible():
    assert_same(restarted_run(restarts(rounds=2))[0], restarted_run(restarts(rounds=2))[0])


class Spoil(Hook):
    """Marks particles once all levels are done, before the restarts see them."""

    def __init__(self, field, rows):
        self.field, self.rows, self.done = field, rows, False

    def after_levels(self, state, info):
        if self.done:
            return state
        self.done = True
        marks = getattr(state, self.field).clone()
        marks[self.rows] = True
        return dataclasses.replace(state, **{self.field: marks})


@pytest.mark.parametrize("field", ["diverged", "masked"])
def test_particles_that_are_out_become_no_parents(field):
    ranking = sorted(range(4), key=losses(restarted_run()[0]).__getitem__)
    _, (row,), _ = restarted_run(Spoil(field, ranking[:2]), restarts(keep=3))
    assert row["kept"] == ranking[2:]
    assert row["diverged"] == (sorted(ranking[:2]) if field == "diverged" else [])


def test_particles_that_measure_infinity_become_no_parents():
    ranking = sorted(range(4), key=losses(restarted_run()[0]).__getitem__)

    def some(finite):
        return lambda z, loss: torch.where(torch.isin(torch.arange(len(z)), torch.tensor(finite)), loss, torch.nan)

    _, (row,), _ = restarted_run(Spoil("diverged", ranking[:1]), restarts(keep=3, energy=some(ranking[2:])))
    assert row["kept"] == ranking[2:]
    state, rows, _ = restarted_run(Spoil("diverged", ranking[:1]), restarts(energy=some(ranking[:1])))
    assert (state.ids, rows) == (IDS, [])


def test_nobody_left_ends_the_run():
    state, rows, _ = restarted_run(Spoil("diverged", IDS), restarts(rounds=3))
    assert (state.ids, rows) == (IDS, [])
