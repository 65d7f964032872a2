import dataclasses

import numpy as np
import pytest
import torch
from analytic import F64, normal
from sampler_support import (
    LEVELS,
    MATRIX,
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
    tensor_fields,
)

from diffusion.paths import edm_path
from operators.operator import Operator
from priors.autoencoder import IdentityAutoencoder
from priors.prior import Prior
from pruning import Pruning, PruningSettings, image_distances, keep_diverse, keep_lowest
from runs.hooks import level_of
from runs.rng import ParticleStreams
from sampler import Hook, Info

NAN, INF = float("nan"), float("inf")
PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)
IDS = [0, 1, 2, 3, 4, 5]


def pruning(at_level=2, loss_std=1.0, expected=-INF, **changes):
    rule = PruningSettings(at_level, **({"first_child_id": 6} | changes))
    return Pruning(*problem(), rule, PATH, expected, loss_std)


def within(losses, tolerance):
    return min((loss for loss in losses if loss < INF), default=INF) + tolerance


def pruned_run(*hooks, ids=IDS):
    """The last state, what was logged, and the states of every moment after ``hooks``."""
    info, recorder = Info(), Recorder()
    state = loop(settings(), [*hooks, recorder]).sample(measurement(), ParticleStreams(42, 0), ids, info)
    return state, info.rows.get("pruning", []), recorder.seen


def plain_losses(level):
    """Loss of the decoded ``z0_y`` of every particle at a level of the run without hooks."""
    z0_y = pruned_run()[2]["before_renoise"][level].z0_y.flatten(1).numpy()
    return ((z0_y @ MATRIX.T - Y) ** 2).sum(1)


# --- What to keep ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "keep", "expected"),
    [
        ([3.0, 1.0, 2.0, 0.5], 2, [3, 1]),
        ([3.0, 1.0, 2.0, 0.5], 4, [3, 1, 2, 0]),
        ([1.0, 1.0, 1.0], 2, [0, 1]),
        ([NAN, 5.0, INF, 4.0], 2, [3, 1]),
        ([NAN, 1e30, NAN], 1, [1]),
        ([2.0], 3, [0]),
    ],
)
def test_lowest_losses_are_kept_best_first(losses, keep, expected):
    assert keep_lowest(losses, keep) == expected


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1], [1, 3, 0, 2]])
def test_finite_losses_come_before_the_others_in_every_order(order):
    losses = [[NAN, 7.0, INF, 3.0][i] for i in order]
    assert [losses[i] for i in keep_lowest(losses, 2)] == [3.0, 7.0]
    assert len(keep_lowest(losses, 3)) == 3


def line(*positions):
    return np.abs(np.subtract.outer(positions, positions)).tolist()


@pytest.mark.parametrize(
    ("losses", "positions", "keep", "expected"),
    [
        ([2.0, 1.0], [0.0, 0.05], 2, [1]),  # a close pair: the lower loss
        ([1.0, 2.0], [0.0, 0.05], 2, [0]),
        ([1.0, 2.0], [0.0, 0.1], 2, [0, 1]),  # not nearer than close
        ([1.0, 4.0], [0.0, 1.0], 2, [0, 1]),  # far, just within the tolerance of 3
        ([1.0, 4.01], [0.0, 1.0], 2, [0]),  # far, but too bad
        ([3.0, 1.0, 2.0], [0.0, 1.0, 2.0], 2, [1, 2]),  # at most keep
        ([3.0, 1.0, 2.0], [0.0, 1.0, 2.0], 1, [1]),
        ([1.0, 1.5, 2.0], [0.0, 0.05, 1.0], 2, [0, 2]),  # the far one takes the place of the near one
        ([1.0, 1.5, 2.0], [0.0, 1.0, 1.05], 3, [0, 1]),  # near to any that is kept
        ([1.0, 1.1, 1.2], [0.0, 0.09, 0.18], 3, [0, 2]),  # nearness to one that was dropped does not count
        ([NAN, 2.0, INF], [0.0, 1.0, 2.0], 3, [1]),
        ([NAN, NAN], [0.0, 1.0], 2, [0]),  # at least one
    ],
)
def test_diverse_particles_are_kept(losses, positions, keep, expected):
    assert keep_diverse(losses, line(*positions), keep, within(losses, 3.0), 0.1) == expected


def test_diverse_bears_distances_that_are_not_numbers():
    assert keep_diverse([1.0, NAN, 2.0], [[0, NAN, 1], [NAN, NAN, NAN], [1, NAN, 0]], 3, 4.0, 0.1) == [0, 2]


def test_diverse_keeps_between_one_and_keep():
    for seed in range(30):
        losses, positions = normal(6, seed=seed).tolist(), normal(6, seed=seed + 100).numpy() / 5
        for keep in (1, 2, 4):
            kept = keep_diverse(losses, line(*positions), keep, within(losses, 1.0), 0.1)
            assert 1 <= len(kept) <= keep and kept[0] == int(np.argmin(losses))
            assert all(abs(positions[i] - positions[j]) >= 0.1 for i in kept for j in kept if i != j)
            assert all(losses[i] <= min(losses) + 1 for i in kept)


def test_distances_are_root_mean_squares_in_zero_to_one():
    x = normal(4, 3, 5, 2)
    pixels = (x / 2 + 0.5).numpy()
    expected = [[np.sqrt(((a - b) ** 2).mean()) for a in pixels] for b in pixels]
    np.testing.assert_allclose(image_distances(x), expected, rtol=1e-12, atol=0)
    black_and_white = torch.stack([-torch.ones(1, 4, 4), torch.ones(1, 4, 4)])
    assert image_distances(black_and_white).tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("step", "levels", "expected"),
    [
        (200, 5, 4),
        (200, 15, 12),
        (200, 50, 40),
        (199, 50, 41),
        (201, 50, 40),
        (300, 10, 7),
        (700, 30, 9),
        (0, 50, None),
        (19, 50, None),
        (20, 50, 49),
        (1000, 50, 0),
        (999, 50, 1),
        (-1, 50, None),
    ],
)
def test_level_of_a_step(step, levels, expected):
    assert level_of(step, levels) == expected


@pytest.mark.parametrize("levels", range(1, 60))
def test_level_of_every_whole_time_is_that_level(levels):
    """Floats would miss some: 1000 * (1 - k / K) is not always what it should be."""
    for level in range(levels):
        if 1000 * level % levels == 0:
            assert level_of(1000 - 1000 * level // levels, levels) == level


# --- Pruning in the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["slice", "mask"])
@pytest.mark.parametrize("at_level", range(LEVELS))
def test_the_lowest_losses_of_the_level_survive_unchanged(at_level, mode):
    state, (row,), _ = pruned_run(pruning(at_level, keep=2, mode=mode))
    losses, plain = plain_losses(at_level), run(settings(), ids=IDS)
    kept = sorted(np.argsort(losses)[:2].tolist())
    assert kept != [0, 1]  # the first two would be kept by a hook that does not look
    assert row["kept"] == kept and row["pruned"] == [i for i in IDS if i not in kept]
    np.testing.assert_allclose(row["losses"], losses, rtol=1e-10)
    assert row["particle_ids"] == IDS and row["branched"] == []
    if mode == "slice":
        assert state.ids == kept
        assert_same(state, plain, kept, exact=False)
    else:
        assert state.ids == IDS and torch.nonzero(~state.masked).flatten().tolist() == kept
        assert_same(dataclasses.replace(state, masked=plain.masked), plain)


@pytest.mark.parametrize("at_level", range(LEVELS))
def test_it_fires_once_at_exactly_its_level(at_level):
    _, rows, seen = pruned_run(pruning(at_level, keep=3))
    assert [(r["step"], r["sigma"], r["t"]) for r in rows] == [(at_level, PATH[at_level].item(), 1000 - 200 * at_level)]
    assert [len(s) for s in seen["before_ode"]] == [6 if k <= at_level else 3 for k in range(LEVELS)]
    assert [len(s) for s in seen["before_renoise"]] == [6 if k < at_level else 3 for k in range(LEVELS)]


def test_a_level_that_does_not_exist_prunes_nothing():
    state, rows, _ = pruned_run(pruning(LEVELS, keep=1))
    assert rows == []
    assert_same(state, run(settings(), ids=IDS))


@pytest.mark.parametrize("mode", ["slice", "mask"])
def test_keeping_all_is_the_plain_run(mode):
    state, (row,), _ = pruned_run(pruning(keep=6, mode=mode))
    assert_same(state, run(settings(), ids=IDS))
    assert row["kept"] == IDS and row["pruned"] == []


def test_a_pruned_batch_leaves_nothing_behind():
    _, _, seen = pruned_run(pruning(1, keep=2))
    for state in (seen["before_renoise"][1], *seen["before_ode"][2:], *seen["after_mcmc"][2:], *seen["at_end"]):
        for name in tensor_fields(state):
            tensor = getattr(state, name)
            assert len(tensor) == 2, name
            assert name == "y" or tensor.untyped_storage().nbytes() == tensor.nbytes, name  # no view of the old batch


def test_diverse_rule_uses_distances_and_the_standard_deviation_of_the_loss():
    _, (row,), seen = pruned_run(pruning(keep=6, rule="diverse", tolerance=2.0, close=0.3, loss_std=0.3))
    images = problem()[0].decode(pruned_run()[2]["before_renoise"][2].z0_y)
    distances = image_distances(images)
    np.testing.assert_allclose(row["distances"], distances, rtol=1e-10, atol=1e-12)
    limit = within(plain_losses(2).tolist(), 0.6)
    expected = keep_diverse(plain_losses(2).tolist(), distances.tolist(), 6, limit, 0.3)
    without_distances = keep_diverse(plain_losses(2).tolist(), distances.tolist(), 6, limit, 0.0)
    without_losses = keep_diverse(plain_losses(2).tolist(), distances.tolist(), 6, INF, 0.3)
    assert len({tuple(kept) for kept in (expected, without_distances, without_losses)}) == 3
    assert row["kept"] == sorted(expected) == seen["at_end"][0].ids


class Break(Hook):
    """Makes some particles diverge at one level."""

    def __init__(self, step, rows):
        self.step, self.rows = step, rows

    def before_ode(self, state, info):
        if state.step != self.step:
            return state
        z = state.z.clone()
        z[self.rows] = torch.nan
        return dataclasses.replace(state, z=z)


@pytest.mark.parametrize("rule", ["loss", "diverse"])
@pytest.mark.parametrize("step", [0, 2])
def test_diverged_particles_go_first(rule, step):
    """Also those whose last finite answer has the lowest loss."""
    best = np.argsort(plain_losses(2))[:3].tolist()
    state, (row,), _ = pruned_run(Break(step, best), pruning(keep=3, rule=rule, tolerance=INF, close=0.0))
    healthy = [i for i in IDS if i not in best]
    assert row["kept"] == healthy == state.ids
    assert not state.diverged.any()
    assert [row["losses"][i] for i in best] == [INF] * 3


def test_an_answer_with_a_nan_loss_goes_first():
    class Poisoned(type(problem()[1])):
        def loss(self, x, y):
            loss = super().loss(x, y)
            loss[best] = torch.nan
            return loss

    best = np.argsort(plain_losses(2))[:2].tolist()
    hook = Pruning(problem()[0], Poisoned(MATRIX), PruningSettings(2, keep=4), PATH, -INF, 1.0)
    state, _, _ = pruned_run(hook)
    assert state.ids == [i for i in IDS if i not in best]


def test_losses_are_those_of_the_decoded_images():
    class Doubler(IdentityAutoencoder):
        def decode(self, z):
            return 2 * z

    class Total(Operator):
        name, noise_sigma = "total", 0.1

        def __call__(self, x):
            return x.flatten(1).sum(1, keepdim=True)

        def measurement_shape(self, image_shape):
            return (1,)

    shape = (3, 1, 1)
    prior = Prior("doubler", Doubler(), None, shape, shape)
    hook, info = Pruning(prior, Total(), PruningSettings(0, keep=1), PATH, -INF, 1.0), Info()
    state = loop(settings()).start(torch.tensor([[3.0]], dtype=F64), ParticleStreams(0, 0), [5, 6, 7])
    z0_y = torch.tensor([1.0, 0.4, 3.0], dtype=F64).reshape(3, 1, 1, 1).expand(3, *shape) / 1
    kept = hook.before_renoise(dataclasses.replace(state, z0_y=z0_y, loss=-z0_y[:, 0, 0, 0]), info)
    assert info.rows["pruning"][0]["losses"] == pytest.approx([9.0, 0.36, 225.0])
    assert kept.ids == [6]


# --- Branching -------------------------------------------------------------------------------------------------------


def branch(at_level, branch_sigma, keep=2, **changes):
    return pruning(at_level, keep=keep, branch_sigma=branch_sigma, **changes)


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
    state, (row,), seen = pruned_run(branch(3, PATH[1].item(), keep=keep, first_child_id=20))
    ranked = np.argsort(plain_losses(3))[:keep].tolist()
    count = 6 - keep
    expected = [{"parent": ranked[i % keep], "child": 20 + i} for i in range(count)]
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
