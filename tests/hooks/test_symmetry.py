"""Symmetry moves in the loop: at which levels, for which particles, with which random numbers."""

import dataclasses
import math

import pytest
import torch
from analytic import normal, prior_of
from sampler_support import LEVELS, assert_same, settings
from symmetry_support import IMAGE, OPERATOR, Y, applied, image_prior, mixture, moves, near, state_of, wrong_channel

from particledaps.operators.phase_retrieval import rotate_180
from particledaps.priors.prior import in_autocast
from particledaps.runs.calls import Calls, count_calls
from particledaps.streams import ParticleStreams
from sampler import Info, LatentDAPS
from symmetry import MOVES, Settings, SymmetryMoves

NAN = float("nan")


def test_moves_are_made_at_their_levels():
    plan = Settings(moves=MOVES, sigma_max=3, sigma_min=0.3, window_sigma=5, every=2)
    inside = ["channels", "conjugate", "flip", "crossover"]
    for step, sigma, expected in (
        (0, 5.0, ["window"]),
        (0, 4.9, []),
        (2, 3.0, inside),
        (3, 3.0, []),
        (4, 0.3, inside),
        (4, 0.29, []),
    ):
        assert plan.moves_at(step, sigma) == expected
    assert dataclasses.replace(plan, moves=("flip", "channels")).moves_at(0, 1.0) == ["flip", "channels"]
    assert dataclasses.replace(plan, moves=()).moves_at(0, 1.0) == []


def test_moves_of_one_level_follow_each_other():
    """First the particle, then its channel: the second starts from the answer of the first."""
    z = rotate_180(wrong_channel(IMAGE))
    after, rows = applied(moves(image_prior(False), OPERATOR, "flip", "channels"), state_of(z, Y))
    assert [row["move"] for row in rows] == ["flip", "channels"]
    assert [row["accepted"] for row in rows] == [[True], [True]]
    torch.testing.assert_close(after.z0_y, IMAGE)
    assert rows[1]["plausibility_before"] == pytest.approx(rows[0]["plausibility_after"])


@pytest.mark.parametrize("density", [True, False])
@pytest.mark.parametrize("move", MOVES)
def test_diverged_masked_and_broken_particles_are_left_alone(move, density):
    z = near(rotate_180(IMAGE), 6, scale=0.1)
    z[1, 0, 0, 0], z[2, 1] = NAN, math.inf
    z[5] = wrong_channel(normal(1, *IMAGE.shape[1:], seed=2))[0]
    state = dataclasses.replace(
        state_of(z, Y, sigma=3.0),
        diverged=torch.tensor([False, False, False, True, False, False]),
        masked=torch.tensor([False, False, False, False, True, False]),
    )
    hook = moves(image_prior(density), OPERATOR, move, crossover_ratio=1.01)
    after, rows = applied(hook, state)
    assert len(rows) == 1 and set(rows[0]["particle_ids"]) <= {0, 5}
    for i in (1, 2, 3, 4):
        assert torch.equal(after.z0_y[i].nan_to_num(7), z[i].nan_to_num(7)) and after.loss[i] == -1
    healthy, _ = applied(hook, state_of(z[[0, 5]], Y, ids=[0, 5], sigma=3.0))
    torch.testing.assert_close(after.z0_y[[0, 5]], healthy.z0_y)
    everyone_lost = dataclasses.replace(state, diverged=torch.ones(6, dtype=torch.bool))
    assert applied(hook, everyone_lost) == (everyone_lost, [])


def test_moves_to_what_is_not_finite_are_refused():
    class Broken(torch.nn.Module):
        def encode(self, x):
            return x / 0

        def decode(self, z):
            return z

    prior = prior_of(mixture([1.0], [IMAGE[0]], 0.3), tuple(IMAGE.shape[1:]), Broken())
    z = near(rotate_180(IMAGE), 2)
    for move in ("flip", "window"):
        after, (row,) = applied(moves(prior, OPERATOR, move), state_of(z, Y, sigma=3.0))
        assert row["accepted"] == [False, False] and torch.equal(after.z0_y, z)


def small_run(hooks, ids=(0, 1, 2), info=None):
    prior = prior_of(mixture([0.5, 0.5], [IMAGE[0], rotate_180(IMAGE)[0]], 0.3), tuple(IMAGE.shape[1:]))
    loop = LatentDAPS(prior, OPERATOR, settings(), hooks(prior))
    return loop.sample(Y, ParticleStreams(42, 0), list(ids), info)


WITHOUT_CROSSOVER = ("window", "channels", "conjugate", "flip")


def test_refused_moves_change_no_other_random_number():
    """A ratio of -infinity refuses everything; every other stream draws what it draws in the plain run."""

    def hooks(prior):
        hook = moves(prior, OPERATOR, "channels", "conjugate", "flip", sigma_max=99.0, sigma_min=0.0)
        hook._metropolis = lambda move, log_ratio, state: torch.zeros_like(state.diverged)
        return [hook]

    info = Info()
    refused, plain = small_run(hooks, info=info), small_run(lambda prior: [])
    assert len(info.rows["symmetry"]) == 3 * LEVELS
    assert_same(refused, plain)
    assert_same(small_run(lambda prior: [moves(prior, OPERATOR)]), plain)


def test_each_particle_moves_as_if_it_were_alone():
    def hooks(prior):
        return [moves(prior, OPERATOR, *WITHOUT_CROSSOVER, sigma_max=99.0, sigma_min=0.0, window_sigma=2.0)]

    info = Info()
    together = small_run(hooks, info=info)
    assert any(any(row["accepted"]) for row in info.rows["symmetry"] if row["move"] in ("flip", "channels"))
    assert_same(small_run(hooks, ids=[2]), together, [2], exact=False)
    assert_same(small_run(hooks, ids=[2, 0, 1]), together, [2, 0, 1], exact=False)
    assert not torch.allclose(together.z0_y, small_run(lambda prior: []).z0_y)


def test_a_density_is_seen_through_the_wrappers_of_a_run():
    """Counted and in autocast, as the command line has it."""
    prior = count_calls(in_autocast(image_prior(), torch.bfloat16), Calls())
    (row,) = applied(moves(prior, OPERATOR, "flip"), state_of(near(IMAGE), Y))[1]
    assert row["rule"] == "metropolis"
    without = count_calls(in_autocast(image_prior(False), torch.bfloat16), Calls())
    assert SymmetryMoves(without, OPERATOR, Settings()).log_prob is None
