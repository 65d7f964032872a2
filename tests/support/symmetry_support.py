"""Phase retrieval on a small image with a mixture as the prior, for the tests of symmetry moves."""

import torch
from analytic import F64, normal, prior_of
from sampler_support import LEVELS, SIGMA_MAX, SIGMA_MIN

from particledaps.diffusion.analytic import GaussianMixtureDenoiser
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.operators.symmetry_moves import flip_channels
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams
from sampler import Info, State
from symmetry import Settings, SymmetryMoves

CPU = torch.device("cpu")
PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)
SIDE = 8


def mixture(weights, means, std):
    means = torch.stack(means)
    return GaussianMixtureDenoiser(torch.tensor(weights, dtype=F64), means, torch.full((len(means),), std, dtype=F64))


def without_density(denoiser):
    """The same denoiser as a network has it: no density is known."""
    return lambda z, sigma: denoiser(z, sigma)


def state_of(z, y, ids=None, step=0, sigma=1.0, image_id=0):
    """Particles with estimates ``z``, just before re-noising."""
    count = len(z)
    ids = torch.arange(count) if ids is None else torch.as_tensor(ids)
    return State(
        z=z + 100,
        z0_hat=z + 50,
        z0_y=z,
        y=y.expand(count, *y.shape[1:]),
        loss=torch.full((count,), -1.0, dtype=z.dtype),
        particle_id=ids,
        parent_id=torch.full_like(ids, -1),
        diverged=torch.zeros(count, dtype=torch.bool),
        masked=torch.zeros(count, dtype=torch.bool),
        level=torch.full_like(ids, step + 1),
        next_id=1000,
        streams=ParticleStreams(42, image_id),
        step=step,
        sigma=sigma,
    )


def moves(prior, operator, *names, **changes):
    return SymmetryMoves(prior, operator, Settings(moves=names, **{"every": 1} | changes))


def applied(hook, state):
    """The state after the hook, and its rows."""
    info = Info()
    after = hook.before_renoise(state, info)
    return after, info.rows.get("symmetry", [])


IMAGE = 0.3 * normal(1, 1, SIDE, SIDE, seed=5) * torch.tensor([1.5, 1.0, 0.7], dtype=F64)[None, :, None, None]
OPERATOR = PhaseRetrieval()
Y = OPERATOR(IMAGE)


def image_prior(density=True, std=0.3):
    """Upright images only."""
    denoiser = mixture([1.0], [IMAGE[0]], std)
    return prior_of(denoiser if density else without_density(denoiser), tuple(IMAGE.shape[1:]))


def near(x, count=1, seed=0, scale=0.01):
    return x.expand(count, *x.shape[1:]) + scale * normal(count, *x.shape[1:], seed=seed)


def wrong_channel(x):
    return flip_channels(x, torch.tensor([[False, False, True]]))
