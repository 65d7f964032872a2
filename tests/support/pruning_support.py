"""Runs of six particles on the analytic problem, pruned or not, for the tests of pruning."""

import dataclasses

import torch
from sampler_support import LEVELS, MATRIX, SIGMA_MAX, SIGMA_MIN, Recorder, Y, loop, measurement, problem, settings

from particledaps.particles.data_term import Expected
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams
from pruning import Pruning, Settings
from sampler import Hook, Info

NAN, INF = float("nan"), float("inf")
PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)
IDS = [0, 1, 2, 3, 4, 5]


def pruning(at_level=2, loss_std=1.0, expected=-INF, **changes):
    return Pruning(*problem(), Settings(**changes), PATH, at_level, at_the_answer(expected, loss_std))


def at_the_answer(mean, std):
    """What is expected of the loss, whatever was measured."""
    return lambda prior, operator, y: Expected(mean, std)


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
