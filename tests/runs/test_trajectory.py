"""Whom the trajectory figure shows."""

import torch
from sampler_support import LEVELS, SIGMA_MAX, SIGMA_MIN, loop, measurement, problem, settings

from diffusion.paths import edm_path
from restarts import Restarts, RestartSettings
from runs.console import TrajectoryHook
from runs.rng import ParticleStreams

PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)


def test_the_first_generation_and_the_survivors_ancestors_are_shown():
    rounds = Restarts(*problem(), RestartSettings(3, 1, 2, (PATH[2].item(),), 4), PATH)
    hook = TrajectoryHook(LEVELS)
    state = loop(settings(), [rounds, hook]).sample(measurement(), ParticleStreams(42, 0), [0, 1])
    survivor = max(state.ids)
    born = dict(zip(state.ids, state.parent_id.tolist(), strict=True))
    shown = {i for s in hook.decoded(problem()[0], torch.device("cpu"), [survivor]) for i in s.ids}
    line = {survivor, born[survivor]}
    assert {0, 1} | line <= shown
    others = set(range(4, 4 + 3 * 2)) - line
    assert len(shown & others) <= 1  # the parent's own parent, if it was a child
    everyone = {i for s in hook.rows for i in s.ids}
    assert everyone == {0, 1, *range(4, 10)}
