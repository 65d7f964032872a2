"""Runs on the analytic problem with the hooks that a configuration asks for."""

import dataclasses

import torch
from sampler_support import LEVELS, SIGMA_MAX, SIGMA_MIN, Recorder, loop, measurement, problem, settings

from particledaps.paths.schedules import edm_path
from particledaps.runs.clock import ClockHook, PhaseClock
from particledaps.streams import ParticleStreams
from plan import build_plan
from run_settings import RunSettings
from sampler import Info

CPU, IDS = torch.device("cpu"), [0, 1, 2, 3]
PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)
REPEL = {"repulsion_scale": 0.4, "repulsion_features": "latent", "repulsion_sigma_break": 0.01}
PRUNE, OPTIMISE = {"pruning_step": 600}, {"optimization_step": 400, "optimization_max_iters": 20}
EVERY = {"optimization_when": "every"}


def planned(**keys):
    """The plan of these keys on the analytic problem, t = 1000, 800, 600, 400, 200."""
    return plan_for(*problem(), **keys)


def plan_for(prior, operator, path=PATH, **keys):
    """The plan of these keys for a prior and an operator."""
    return build_plan(RunSettings(**keys), prior, operator, dataclasses.replace(settings(), path=path), CPU)


def planned_run(**keys):
    """The last state, the record's parts and the clock of a run on the analytic problem."""
    plan, clock, info, recorder = planned(**keys), PhaseClock(CPU), Info(), Recorder()
    hooks = [*plan.hooks(clock), recorder, ClockHook(clock)]
    clock.enter(plan.phases[0])
    state = loop(settings(), hooks).sample(measurement(), ParticleStreams(42, 0), IDS, info)
    clock.leave()
    assert set(clock.phases) == set(plan.phases)
    return state, info, clock, recorder, plan


NEUTRAL = {
    "nothing": {},
    "repulsion of scale 0": {**REPEL, "repulsion_scale": 0.0},
    "repulsion that only logs": {**REPEL, "repulsion_scale": 0.0, "repulsion_log": True},
    "no pruning": {"pruning_step": -1, "pruning_keep": 1},
    "pruning that keeps all": {**PRUNE, "pruning_keep": 4},
    "no optimisation": {"optimization_step": -1, "optimization_accept": "loss"},
    "no iterations": {**OPTIMISE, "optimization_max_iters": 0},
    "no iterations at every level": {**OPTIMISE, **EVERY, "optimization_max_iters": 0},
    "all of them": {
        **REPEL,
        "repulsion_scale": 0.0,
        "repulsion_log": True,
        **PRUNE,
        "pruning_keep": 4,
        **OPTIMISE,
        "optimization_max_iters": 0,
    },
}
