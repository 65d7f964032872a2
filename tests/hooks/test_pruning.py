"""Pruning as a hook of the loop."""

import dataclasses

import numpy as np
import pytest
import torch
from analytic import F64
from pruning_support import IDS, INF, PATH, Break, plain_losses, pruned_run, pruning, within
from sampler_support import LEVELS, MATRIX, assert_same, loop, problem, run, settings, tensor_fields

from particledaps.operators.operator import Operator
from particledaps.priors.autoencoder import IdentityAutoencoder
from particledaps.priors.prior import Prior
from particledaps.streams import ParticleStreams
from pruning import Pruning, Settings, image_distances, keep_diverse
from sampler import Info


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
    hook = Pruning(problem()[0], Poisoned(MATRIX), Settings(keep=4), PATH, 2)
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
    hook, info = Pruning(prior, Total(), Settings(keep=1), PATH, 0), Info()
    state = loop(settings()).start(torch.tensor([[3.0]], dtype=F64), ParticleStreams(0, 0), [5, 6, 7])
    z0_y = torch.tensor([1.0, 0.4, 3.0], dtype=F64).reshape(3, 1, 1, 1).expand(3, *shape) / 1
    kept = hook.before_renoise(dataclasses.replace(state, z0_y=z0_y, loss=-z0_y[:, 0, 0, 0]), info)
    assert info.rows["pruning"][0]["losses"] == pytest.approx([9.0, 0.36, 225.0])
    assert kept.ids == [6]
