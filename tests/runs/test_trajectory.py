"""Whom the trajectory figure shows."""

import torch
from sampler_support import LEVELS, SIGMA_MAX, SIGMA_MIN, loop, measurement, problem, settings

from particledaps.paths.schedules import edm_path
from particledaps.runs.watchers import TrajectoryHook
from particledaps.streams import ParticleStreams
from restarts import Restarts, Settings
from sampler import Info

PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)
ROUNDS = Settings(3, children=2, sigmas=(PATH[2].item(),))


def test_the_first_generation_and_the_survivors_ancestors_are_shown():
    rounds = Restarts(*problem(), ROUNDS, PATH, 4)
    hook, info = TrajectoryHook(LEVELS), Info()
    state = loop(settings(), [rounds, hook]).sample(measurement(), ParticleStreams(42, 0), [0, 1], info)
    survivor = max(state.ids)
    parents = {pair["child"]: pair["parent"] for row in info.rows["restarts"] for pair in row["branched"]}
    line = [survivor]
    while line[-1] in parents:
        line.append(parents[line[-1]])
    assert len(parents) == 6 and len(line) > 1
    shown = {i for s in hook.decoded(problem()[0], torch.device("cpu"), [survivor]) for i in s.ids}
    assert shown == {0, 1} | set(line)
    everyone = {i for s in hook.rows for i in s.ids}
    assert everyone == {0, 1, *range(4, 10)}


def test_the_lineage_ends_with_the_particle_and_holds_what_its_children_found():
    rounds = Restarts(*problem(), ROUNDS, PATH, 4, lambda z, y: 0.5 * z)
    hook, prior = TrajectoryHook(LEVELS), problem()[0]
    state = loop(settings(), [rounds, hook]).sample(measurement(), ParticleStreams(42, 0), [0, 1])
    particle, born = state.ids[-1], dict(zip(state.ids, state.parent_id.tolist(), strict=True))
    line = hook.lineage(prior, torch.device("cpu"), particle)
    ids = [i for i, _ in line]
    assert ids[-2:] == [born[particle], particle] and ids[0] in (0, 1)
    assert torch.equal(line[-1][1], prior.decode(state.z0_y[-1:])[0])
    parent = state.ids.index(born[particle])
    assert torch.equal(line[-2][1], prior.decode(state.z0_y[parent : parent + 1])[0])  # as it was after its polish
