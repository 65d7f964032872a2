"""Detailed balance: moves recover the exact weights of the modes."""

import math

import pytest
import torch
from analytic import F64, MatrixOperator, normal, prior_of
from symmetry_support import mixture, moves, state_of
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from particledaps.diffusion.analytic import GaussianMixtureDenoiser
from particledaps.diffusion.score import denoising_loss, score
from particledaps.operators import symmetry_moves
from particledaps.operators.phase_retrieval import rotate_180
from particledaps.operators.symmetry_moves import conjugate_band, flip_channels, ring
from sampler import Info
from symmetry import SymmetryMoves

# --- The density of a mixture, and what stands in for one ------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.0, 0.7])
def test_density_of_a_mixture(sigma):
    means, stds = normal(3, 2, 2, 1, seed=1), torch.tensor([0.5, 1.0, 0.2], dtype=F64)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    denoiser, z = GaussianMixtureDenoiser(weights, means, stds), normal(6, 2, 2, 1)
    total = (stds.square() + sigma**2).sqrt()[:, None].expand(3, 4)
    parts = Independent(Normal(means.flatten(1), total), 1)
    expected = MixtureSameFamily(Categorical(weights), parts).log_prob(z.flatten(1))
    torch.testing.assert_close(denoiser.log_prob(z, sigma), expected)
    if sigma > 0:
        leaf = z.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(denoiser.log_prob(leaf, sigma).sum(), leaf)
        torch.testing.assert_close(gradient, score(denoiser, z, sigma))


def test_denoising_loss_is_its_formula():
    """A denoiser that answers 0 leaves the latent itself, at every noise."""
    z, sigmas = normal(3, 2, 4, 4), (0.5, 2.0)
    noise = normal(3, 2, 5, 2, 4, 4, seed=1)
    zero = denoising_loss(lambda z, sigma: 0 * z, z, sigmas, noise)
    torch.testing.assert_close(zero, z.square().flatten(1).mean(1) * (1 / 0.25 + 1 / 4))
    same = denoising_loss(lambda z, sigma: z, z, sigmas, noise)
    torch.testing.assert_close(same, noise.square().mean((2, 3, 4, 5)).sum(1))


# --- Detailed balance ------------------------------------------------------------------------------------------------

STD, TAU, FAVOUR, PARTICLES, ROUNDS = 0.3, 0.6, 1.3, 600, 8
BAND = ring(4, 4, 0, 0.3)
BALANCED = {
    "flip": (rotate_180, (1, 2, 3)),
    "channels": (lambda x: flip_channels(x, torch.tensor([[False, True]])), (2, 2, 3)),
    "conjugate": (lambda x: conjugate_band(x, BAND), (1, 4, 4)),
}


def evidence_covariance(operator):
    return STD**2 * operator.matrix @ operator.matrix.T + TAU**2 * torch.eye(2, dtype=F64)


def bimodal(move):
    """Two modes of weights 0.7 and 0.3 that a move exchanges, and a measurement that favours the second."""
    image_move, shape = BALANCED[move]
    first = 2 * normal(1, *shape, seed=3)
    if move == "channels":
        first[:, 0] *= 3  # the reference
    second = image_move(first)
    assert (first - second).norm() > 10 * STD
    prior = prior_of(mixture([0.7, 0.3], [first[0], second[0]], STD), shape)
    operator = MatrixOperator(0.1 * normal(2, math.prod(shape), seed=4))
    towards = operator(second) - operator(first)
    step = torch.linalg.solve(evidence_covariance(operator), towards[0])
    y = operator(first) + towards / 2 + FAVOUR * towards / (towards[0] @ step)  # evidences differ by e^FAVOUR
    return prior, operator, y


def posterior_weight(prior, operator, y):
    """Weight of the second mode given y: prior weights times evidences."""
    denoiser = prior.denoiser
    at = MultivariateNormal(operator(denoiser.means), evidence_covariance(operator))
    evidence = at.log_prob(y)
    return torch.softmax(denoiser.log_weights + evidence, dim=0)[1].item()


def nearest_mode(z, prior):
    return torch.cdist(z.flatten(1), prior.denoiser.means.flatten(1)).argmin(1)


def within_mode(z, prior, operator, y, generator):
    """An exact draw of ``p(z | mode, y)`` in the mode where each particle is."""
    matrix = operator.matrix
    size = matrix.shape[1]
    covariance = torch.linalg.inv(torch.eye(size, dtype=F64) / STD**2 + matrix.T @ matrix / TAU**2)
    mode = prior.denoiser.means.flatten(1)[nearest_mode(z, prior)]
    mean = (mode / STD**2 + y @ matrix / TAU**2) @ covariance
    noise = torch.randn(len(z), size, generator=generator, dtype=F64)
    return (mean + noise @ torch.linalg.cholesky(covariance).T).reshape(z.shape)


def weight_found(move, monkeypatch, prior, operator, y):
    """Share of the second mode after moves and draws in turn, all particles starting in the first."""
    monkeypatch.setattr(symmetry_moves, "draw_band", lambda height, width, generator: BAND)
    hook, generator = moves(prior, operator, move, tau=TAU), torch.Generator().manual_seed(0)
    z = prior.denoiser.means[:1].expand(PARTICLES, *prior.latent_shape)
    for step in range(ROUNDS):
        z = within_mode(z, prior, operator, y, generator)
        z = hook.before_renoise(state_of(z, y, step=step), Info()).z0_y
    return nearest_mode(z, prior).double().mean().item()


def standard_errors(move, monkeypatch):
    """How far the weight found lies from the exact one."""
    prior, operator, y = bimodal(move)
    exact = posterior_weight(prior, operator, y)
    found = weight_found(move, monkeypatch, prior, operator, y)
    return abs(found - exact) / (exact * (1 - exact) / PARTICLES) ** 0.5


@pytest.mark.parametrize("move", BALANCED)
def test_metropolis_moves_recover_the_weights_of_the_modes(move, monkeypatch):
    prior, operator, y = bimodal(move)
    odds = 0.3 / 0.7 * math.exp(FAVOUR)  # the measurement counts
    assert posterior_weight(prior, operator, y) == pytest.approx(odds / (1 + odds))
    assert standard_errors(move, monkeypatch) < 3


def test_moves_that_are_always_accepted_do_not(monkeypatch):
    everyone = lambda move, log_ratio, state: torch.ones_like(state.diverged)  # noqa: E731
    monkeypatch.setattr(SymmetryMoves, "_metropolis", staticmethod(everyone))
    assert standard_errors("flip", monkeypatch) > 10


def test_moves_that_forget_the_data_loss_do_not(monkeypatch):
    prior, operator, y = bimodal("flip")
    exact = posterior_weight(prior, operator, y)
    monkeypatch.setattr(MatrixOperator, "loss", lambda self, x, y: torch.zeros(len(x), dtype=F64))
    found = weight_found("flip", monkeypatch, prior, operator, y)
    assert abs(found - exact) > 10 * (exact * (1 - exact) / PARTICLES) ** 0.5
    assert found == pytest.approx(0.3, abs=3 * (0.21 / PARTICLES) ** 0.5)
