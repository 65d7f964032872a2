"""Children of the particles that pruning kept."""

import numpy as np
import pytest
import torch
from pruning_support import IDS, INF, PATH, Break, plain_losses, pruned_run, pruning
from sampler_support import LEVELS, assert_same, run, settings

from particledaps.streams import ParticleStreams


def branch(at_level, branch_sigma, keep=2, **changes):
    return pruning(at_level, keep=keep, branch=branch_sigma, **changes)


def test_children_run_their_levels_and_all_end_together():
    state, (row,), seen = pruned_run(branch(3, PATH[1].item()))
    survivors, children = row["kept"], [6, 7, 8, 9]
    calls = [(s.step, s.ids) for s in seen["before_ode"]]
    expected = [(k, IDS) for k in range(4)] + [(k, children) for k in (1, 2, 3)] + [(4, [*survivors, *children])]
    assert [(step, sorted(ids)) for step, ids in calls] == [(step, sorted(ids)) for step, ids in expected]
    assert all((s.level == s.step).all() for s in (*seen["before_ode"], *seen["after_mcmc"]))
    assert sorted(state.ids) == sorted([*survivors, *children])
    assert (state.level == LEVELS).all()
    assert torch.equal(state.z, state.z0_y)  # the last node is sigma 0


@pytest.mark.parametrize(
    ("branch_sigma", "at_level", "expected"),
    [
        (100.0, 3, 0),
        (PATH[0].item(), 3, 0),
        (PATH[1].item(), 3, 1),
        (PATH[1].item() * (1 - 1e-12), 3, 2),
        (PATH[2].item() * 1.01, 3, 2),
        (PATH[3].item(), 3, 3),
        (PATH[4].item(), 2, 2),
        (1e-9, 3, 3),
        (1e-9, 4, 4),
    ],
)
def test_children_start_at_the_first_small_sigma_but_no_later_than_pruning(branch_sigma, at_level, expected):
    state, (row,), seen = pruned_run(branch(at_level, branch_sigma))
    children = [s for s in seen["before_ode"] if min(s.ids) >= 6]
    first = children[0] if children else seen["before_ode"][at_level + 1]
    assert first.step == expected and first.sigma == PATH[expected].item()
    assert first.t == pytest.approx(1000 - 200 * expected)
    parent_answers = pruned_run()[2]["before_renoise"][at_level].z0_y
    parents = first.parent_id.tolist()
    noise = ParticleStreams(42, 0).normal(first.ids, "renoise", expected - 1, first.z)
    expected_z = parent_answers[parents] + PATH[expected] * noise
    torch.testing.assert_close(first.z, expected_z, rtol=1e-12, atol=1e-12)
    assert len(seen["before_ode"]) == LEVELS + at_level + 1 - expected


@pytest.mark.parametrize("keep", [1, 2, 4, 5])
def test_parents_take_turns_the_best_first(keep):
    state, (row,), seen = pruned_run(branch(3, PATH[1].item(), keep=keep))
    ranked = np.argsort(plain_losses(3))[:keep].tolist()
    count = 6 - keep
    expected = [{"parent": ranked[i % keep], "child": 6 + i} for i in range(count)]
    assert row["branched"] == expected
    born = dict(zip(state.ids, state.parent_id.tolist(), strict=True))
    assert born == {i: -1 for i in ranked} | {pair["child"]: pair["parent"] for pair in expected}


def test_children_do_not_touch_the_survivors():
    alone, (row,), _ = pruned_run(pruning(3, keep=2))
    crowded, _, _ = pruned_run(branch(3, PATH[1].item()))
    rows = [crowded.ids.index(i) for i in row["kept"]]
    assert_same(alone, crowded, rows, exact=False)
    assert_same(alone, run(settings(), ids=IDS), row["kept"], exact=False)


def test_children_of_one_parent_differ_and_their_answers_are_their_own():
    state, _, _ = pruned_run(branch(3, PATH[1].item(), keep=1))
    answers = state.z0_y.flatten(1)
    assert len(state) == 6 and torch.pdist(answers).min() > 0.05
    twice, _, _ = pruned_run(branch(3, PATH[1].item(), keep=1))
    assert_same(twice, state)


def test_a_level_that_runs_twice_prunes_once():
    _, rows, seen = pruned_run(branch(2, PATH[0].item()))
    assert [s.step for s in seen["before_renoise"]].count(2) == 2
    assert len(rows) == 1


def test_nothing_freed_no_children():
    state, (row,), _ = pruned_run(branch(3, PATH[1].item(), keep=6))
    assert row["branched"] == []
    assert_same(state, run(settings(), ids=IDS))


def test_diverse_rule_frees_places_for_children():
    state, (row,), _ = pruned_run(branch(3, PATH[1].item(), keep=6, rule="diverse", close=1e9))
    best = int(np.argmin(plain_losses(3)))
    assert row["kept"] == [best]
    assert row["branched"] == [{"parent": best, "child": c} for c in (6, 7, 8, 9, 10)]
    assert len(state) == 6


def test_diverged_particles_keep_no_place_and_have_no_children():
    state, (row,), _ = pruned_run(Break(0, [0, 1, 2, 3]), branch(3, PATH[1].item(), keep=3))
    assert row["kept"] == [4, 5] and row["diverged"] == [0, 1, 2, 3]
    assert [pair["child"] for pair in row["branched"]] == [6, 7, 8, 9]
    assert {pair["parent"] for pair in row["branched"]} == {4, 5}
    assert not state.diverged[torch.tensor(state.ids) >= 6].any()


def test_tolerance_starts_at_the_expected_loss_where_the_best_is_below_it():
    """A particle that fits the noise must not cost the twin that fits as well as the truth."""
    losses = sorted(plain_losses(2).tolist())
    kept = {}
    for expected in (-INF, losses[3]):
        rule = pruning(keep=6, rule="diverse", tolerance=1e-6, close=0.0, expected=expected)
        kept[expected] = len(pruned_run(rule)[1][0]["kept"])
    assert kept == {-INF: 1, losses[3]: 4}


def test_all_diverged_leaves_one():
    state, (row,), _ = pruned_run(Break(0, IDS), pruning(keep=3))
    assert len(row["kept"]) == len(state) == 1 and bool(state.diverged.all())
