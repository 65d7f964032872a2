"""Settings, an identity problem of two numbers and a state at its end, for the tests of latent optimisation."""

import dataclasses

import torch
from analytic import F64, prior_of
from sampler_support import LEVELS, loop, measurement, settings

from particledaps.particles.data_term import Expected
from particledaps.priors.autoencoder import IdentityAutoencoder
from particledaps.streams import ParticleStreams
from resample_opt import LatentOptimization, Settings
from sampler import Info

NEVER = -float("inf")


def how(**changes):
    return Settings(**({"step": 0, "accept": "loss", "lr": 0.05, "max_iters": 40, "tau": 0.05} | changes))


def optimizer(prior, operator, settings, expected, from_level=0):
    """The hook; ``expected`` of the loss, whatever was measured."""
    level = from_level if settings.when == "every" else None
    return LatentOptimization(prior, operator, settings, level, lambda prior, operator, y: Expected(expected, 1.0))


def numbers(*values):
    return torch.tensor(values, dtype=F64)


IDENTITY = torch.eye(2, dtype=F64)
PIXELS = prior_of(None, (2, 1, 1), IdentityAutoencoder())


def standing(z0_y, y, count=1, level=LEVELS - 1):
    """A state after its last level with these answers, and a place to log."""
    start = loop(settings()).start(measurement(), ParticleStreams(42, 0), range(count))
    z0_y = z0_y.expand(count, 2) if z0_y.ndim == 1 else z0_y
    y = y.expand(len(z0_y), len(y))
    answers = z0_y.reshape(-1, 2, 1, 1)
    levels = torch.full((count,), level + 1)
    return dataclasses.replace(start, z0_y=answers, z0_hat=answers, y=y, step=level, level=levels), Info()


def one_call(hook, state, info, moment="at_end"):
    after = getattr(hook, moment)(state, info)
    (row,) = info.rows["optimization"]
    return after, row
