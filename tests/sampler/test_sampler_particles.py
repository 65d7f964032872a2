import dataclasses

import numpy as np
import pytest
import torch
from analytic import gaussian_prior, normal
from sampler_support import assert_same, each_kernel, full_state, measurement, problem, run, settings, tensor_fields

from particledaps.diffusion.mcmc import ChainSettings
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.streams import ParticleStreams
from sampler import Hook, LatentDAPS

# --- Particles -------------------------------------------------------------------------------------------------------


@each_kernel
def test_four_particles_are_four_runs_of_one(chain):
    together = run(settings(chain))
    for particle in range(4):
        assert_same(run(settings(chain), ids=[particle]), together, [particle], exact=False)
    assert len({tuple(row.tolist()) for row in together.z0_y.flatten(1)}) == 4


@each_kernel
def test_a_subset_is_the_same_particles(chain):
    together = run(settings(chain))
    assert_same(run(settings(chain), ids=[3, 1]), together, [3, 1], exact=False)


@each_kernel
def test_a_run_repeats_bitwise_whatever_the_global_generator(chain):
    torch.manual_seed(1)
    first = run(settings(chain))
    torch.manual_seed(2)
    assert_same(run(settings(chain)), first)


def test_phase_retrieval_particles_are_runs_of_one():
    operator, truth = PhaseRetrieval(), normal(1, 1, 6, 6, seed=2).clamp(-1, 1)
    y = operator.measure(truth, torch.Generator().manual_seed(1))
    prior = gaussian_prior(np.zeros(36), 0.3)
    prior = dataclasses.replace(prior, image_shape=(1, 6, 6), latent_shape=(1, 6, 6))
    prior.denoiser.mean = prior.denoiser.mean.reshape(1, 6, 6)
    run_settings = settings(ChainSettings("langevin", 10, 1e-3), tau=0.2)
    together = LatentDAPS(prior, operator, run_settings).sample(y, ParticleStreams(42, 0), [0, 1, 2])
    alone = LatentDAPS(prior, operator, run_settings).sample(y, ParticleStreams(42, 0), [2])
    assert_same(alone, together, [2], exact=False)


def test_children_are_numbered_after_all_particles_of_the_run():
    """Also where this process runs some of them only."""
    loop = LatentDAPS(*problem(), settings(), first_child_id=4)
    start = loop.start(measurement(), ParticleStreams(42, 0), [0, 2])
    first = start.children([1, 0, 1])
    assert (first.ids, first.parent_id.tolist()) == ([4, 5, 6], [2, 0, 2])
    assert start.join(first).children([0]).ids == [7]
    assert start.children([0], least_id=9).ids == [9]
    assert loop.start(measurement(), ParticleStreams(42, 0), [7, 3]).next_id == 8


# --- State -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [[3, 1], slice(1, 4), torch.tensor([4, 0, 2]), torch.tensor([True, False, True, True, False])],
    ids=["list", "slice", "indices", "mask"],
)
def test_slicing_a_state_slices_every_tensor(index):
    state = full_state()
    kept = state[index]
    assert len(kept) == len(torch.arange(5)[index])
    for name in tensor_fields(state):
        assert torch.equal(getattr(kept, name), getattr(state, name)[index]), name
    assert kept.streams is state.streams and (kept.step, kept.sigma, kept.t) == (state.step, state.sigma, state.t)


def test_slicing_a_state_slices_its_drift():
    term, scale = normal(5, 2, 3, 1, seed=6), torch.arange(5.0)
    kept_term, kept_scale = dataclasses.replace(full_state(), drift=(term, scale))[[3, 1]].drift
    assert torch.equal(kept_term, term[[3, 1]])
    assert torch.equal(kept_scale, scale[[3, 1]])


def test_slicing_a_state_keeps_a_common_drift_scale():
    term = normal(5, 2, 3, 1, seed=6)
    kept_term, kept_scale = dataclasses.replace(full_state(), drift=(term, 0.3))[[3, 1]].drift
    assert torch.equal(kept_term, term[[3, 1]]) and kept_scale == 0.3


class Keep(Hook):
    """Drops all but some particles at one moment of one level."""

    def __init__(self, moment, step, rows):
        setattr(self, moment, lambda state, info: state[rows] if state.step == step else state)


@each_kernel
@pytest.mark.parametrize("moment", ["before_ode", "after_mcmc", "before_renoise"])
def test_survivors_of_slicing_go_on_as_if_nothing_had_happened(chain, moment):
    survivors = run(settings(chain), [Keep(moment, 2, [3, 1])])
    assert survivors.ids == [3, 1]
    assert_same(survivors, run(settings(chain)), [3, 1], exact=False)


def test_the_lowest_are_active_and_finite():
    out = torch.tensor([False, False, True, False, False])
    state = dataclasses.replace(full_state(5), diverged=out, masked=torch.zeros_like(out))
    values = torch.tensor([2.0, float("nan"), 0.0, 1.0, 1.0])
    assert [state.lowest(values, n) for n in (0, 1, 2, 9)] == [[], [3], [3, 4], [3, 4, 0]]
    assert state.lowest(torch.full((5,), torch.inf), 2) == []
