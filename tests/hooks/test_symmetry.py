import dataclasses
import math

import metrics_schema
import numpy as np
import pytest
import torch
from analytic import F64, MatrixOperator, normal, prior_of
from sampler_support import LEVELS, SIGMA_MAX, SIGMA_MIN, assert_same, measurement, problem, settings
from tiny import QUICK, reconstruct
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from diffusion.analytic import GaussianMixtureDenoiser
from diffusion.denoiser import denoising_loss, score
from diffusion.paths import edm_path
from operators import symmetry_moves
from operators.phase_retrieval import PhaseRetrieval, rotate_180
from operators.symmetry_moves import conjugate_band, flip_channels, ring
from runs.checks import SettingsError
from runs.hooks import build_hook_plan, symmetry_record
from runs.phases import PhaseClock
from runs.rng import ParticleStreams
from runs.settings import RunSettings, validate
from sampler import Info, LatentDAPS, State
from symmetry import MOVES, SymmetryMoves, SymmetrySettings

CPU, NAN = torch.device("cpu"), float("nan")
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
        streams=ParticleStreams(42, image_id),
        step=step,
        sigma=sigma,
    )


def moves(prior, operator, *names, **changes):
    return SymmetryMoves(prior, operator, SymmetrySettings(moves=names, **{"every": 1} | changes))


def applied(hook, state):
    """The state after the hook, and its rows."""
    info = Info()
    after = hook.before_renoise(state, info)
    return after, info.rows.get("symmetry", [])


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


# --- Each move on an image prior -------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("density", [True, False])
@pytest.mark.parametrize(("move", "spoil"), [("flip", rotate_180), ("channels", wrong_channel)])
def test_implausible_twins_are_turned_and_plausible_ones_are_not(move, spoil, density):
    """A move of a single random channel meets the wrong one at some level."""
    good = near(IMAGE, 3)
    z = torch.cat([good, spoil(good)])
    hook, state, turned = moves(image_prior(density), OPERATOR, move), state_of(z, Y), 0
    for step in range(12 if density and move == "channels" else 1):
        state, rows = applied(hook, dataclasses.replace(state, step=step))
        turned += sum(sum(row["accepted"]) for row in rows)
        for row in rows:
            for accepted, before, after in zip(
                row["accepted"], row["plausibility_before"], row["plausibility_after"], strict=True
            ):
                assert accepted == (after < before)
            assert row["rule"] == ("metropolis" if density else "denoising")
            assert row["loss_after"] == pytest.approx(row["loss_before"])  # the operator cannot tell
    assert torch.equal(state.z0_y, torch.cat([good, good])) and turned == 3
    expected = OPERATOR.loss(good, Y.expand(3, -1, -1, -1))
    torch.testing.assert_close(state.loss[3:], expected)
    assert (state.loss[:3] == -1).all()
    assert torch.equal(state.z, z + 100) and torch.equal(state.z0_hat, z + 50)


def test_a_margin_and_a_tolerance_hold_a_flip_back():
    z = near(rotate_180(IMAGE))
    prior = image_prior(density=False)
    after, (row,) = applied(moves(prior, OPERATOR, "flip"), state_of(z, Y))
    fall = 1 - row["plausibility_after"][0] / row["plausibility_before"][0]
    assert torch.equal(after.z0_y, rotate_180(z)) and 0.05 < fall < 0.999
    for margin, accepted in ((0.999 * fall, True), (1.001 * fall, False)):
        _, (row,) = applied(moves(prior, OPERATOR, "flip", margin=margin), state_of(z, Y))
        assert row["accepted"] == [accepted]

    operator = MatrixOperator(normal(3, IMAGE.numel(), seed=1))  # one that sees the flip
    y = operator(z) + 1
    _, (row,) = applied(moves(prior, operator, "flip", loss_tolerance=1e9), state_of(z, y))
    rise = row["loss_after"][0] / row["loss_before"][0] - 1
    assert row["accepted"] == [True] and rise > 0.1
    for tolerance, accepted in ((0.999 * rise, False), (1.001 * rise, True)):
        _, (row,) = applied(moves(prior, operator, "flip", loss_tolerance=tolerance), state_of(z, y))
        assert row["accepted"] == [accepted]


def test_plausibility_compares_encodings():
    """An autoencoder that drops half of the latent: the chain's own latent carries what no encoding has."""

    class Half(torch.nn.Module):
        def encode(self, x):
            return torch.cat([x, torch.zeros_like(x)], dim=1)

        def decode(self, z):
            return z[:, : z.shape[1] // 2]

    mean = Half().encode(IMAGE)
    prior = prior_of(without_density(mixture([1.0], [mean[0]], 0.3)), tuple(mean.shape[1:]), Half())
    upright = torch.cat([IMAGE, 3 * normal(*IMAGE.shape, seed=9)], dim=1)
    after, (row,) = applied(moves(prior, OPERATOR, "flip"), state_of(upright, Y))
    assert row["accepted"] == [False] and row["plausibility_before"][0] < row["plausibility_after"][0]
    assert torch.equal(after.z0_y, upright)
    after, (row,) = applied(moves(prior, OPERATOR, "flip"), state_of(Half().encode(rotate_180(IMAGE)), Y))
    assert row["accepted"] == [True]
    torch.testing.assert_close(after.z0_y, mean)


@pytest.mark.parametrize("density", [True, False])
def test_conjugation_repairs_the_band_of_a_stagnated_particle(density, monkeypatch):
    band = ring(SIDE, SIDE, 0, 0.3)
    monkeypatch.setattr(symmetry_moves, "draw_band", lambda height, width, generator: band)
    z = torch.cat([IMAGE, conjugate_band(IMAGE, band)])
    after, (row,) = applied(moves(image_prior(density), OPERATOR, "conjugate"), state_of(z, Y))
    assert row["accepted"] == [False, True] and row["rule"] == ("metropolis" if density else "likelihood")
    assert row["loss_before"][1] > 0.1 and row["loss_after"][1] < 1e-12
    assert torch.equal(after.z0_y[0], IMAGE[0])
    torch.testing.assert_close(after.z0_y[1], IMAGE[0])


def test_bands_of_particles_differ_and_are_their_own(monkeypatch):
    """At an enormous tau every band is accepted, so the result shows which it was."""
    hook = moves(image_prior(False), OPERATOR, "conjugate", tau=1e6)
    z = IMAGE.expand(4, -1, -1, -1)
    together = applied(hook, state_of(z, Y))[0].z0_y
    bands = [
        symmetry_moves.draw_band(SIDE, SIDE, ParticleStreams(42, 0).generators([i], "symmetry_band", 0, CPU)[0])
        for i in range(4)
    ]
    assert len({band.numpy().tobytes() for band in bands}) > 2
    torch.testing.assert_close(together, conjugate_band(z, torch.stack(bands)))
    alone = applied(hook, state_of(z[:1], Y, ids=[2]))[0].z0_y
    torch.testing.assert_close(alone[0], together[2])
    later = applied(hook, state_of(z, Y, step=1))[0].z0_y
    elsewhere = applied(hook, state_of(z, Y, image_id=1))[0].z0_y
    assert not torch.allclose(later, together) and not torch.allclose(elsewhere, together)


def test_windows_are_given_by_the_particle_and_the_sigma():
    hook = moves(image_prior(), OPERATOR, "window", window_sigma=2.0)
    z = near(IMAGE, 3)
    after, (row,) = applied(hook, state_of(z, Y, ids=[0, 5, 2], sigma=2.0))
    torch.testing.assert_close(after.z0_y, symmetry_moves.reduce_support(z, [0, 5, 2]))
    assert row["accepted"] == [True] * 3 and row["rule"] == "always"
    assert applied(hook, state_of(z, Y, sigma=1.99))[1] == []
    assert len(applied(hook, state_of(z, Y, sigma=50.0))[1]) == 1


def test_crossover_replaces_the_worst_by_the_aligned_mean_of_the_good_ones():
    good, bad = near(IMAGE, 2), 2 * normal(2, *IMAGE.shape[1:], seed=8)
    z = torch.cat([bad[:1], good[:1], rotate_180(good[1:]), bad[1:]])
    y = OPERATOR(near(IMAGE, scale=0.02, seed=3))
    hook = moves(image_prior(), OPERATOR, "crossover", crossover_ratio=5.0)
    after, (row,) = applied(hook, state_of(z, y))
    assert row["particle_ids"] == [0, 3] and row["accepted"] == [True, True] and row["rule"] == "loss"
    best = int(OPERATOR.loss(z, y.expand(4, -1, -1, -1))[1:3].argmin())
    mean = good.mean(0) if best == 0 else rotate_180(good.mean(0)[None])[0]
    torch.testing.assert_close(after.z0_y[[0, 3]], mean.expand(2, -1, -1, -1))
    assert torch.equal(after.z0_y[1:3], z[1:3])


def test_crossover_needs_a_particle_that_is_far_off_and_a_gain():
    hook = moves(image_prior(), OPERATOR, "crossover", crossover_ratio=1e9)
    assert applied(hook, state_of(torch.cat([near(IMAGE), near(IMAGE, seed=1, scale=1)]), Y))[1] == []
    assert applied(hook, state_of(near(IMAGE), Y))[1] == []  # alone
    hook = moves(image_prior(), OPERATOR, "crossover", crossover_ratio=1.0)
    opposed = torch.cat([IMAGE + 0.1, IMAGE - 0.1001])  # the mean is the best one: a clone
    after, (row,) = applied(hook, state_of(opposed, Y))
    assert row["accepted"] == [True] and row["loss_after"][0] < row["loss_before"][0]
    torch.testing.assert_close(after.z0_y[1], after.z0_y[0])


# --- Levels, particles and streams -----------------------------------------------------------------------------------


def test_moves_are_made_at_their_levels():
    plan = SymmetrySettings(moves=MOVES, sigma_max=3, sigma_min=0.3, window_sigma=5, every=2)
    inside = ["channels", "conjugate", "flip", "crossover"]
    for step, sigma, expected in (
        (0, 5.0, ["window"]),
        (0, 4.9, []),
        (2, 3.0, inside),
        (3, 3.0, []),
        (4, 0.3, inside),
        (4, 0.29, []),
    ):
        assert plan.moves_at(step, sigma) == expected
    assert dataclasses.replace(plan, moves=("flip", "channels")).moves_at(0, 1.0) == ["flip", "channels"]
    assert dataclasses.replace(plan, moves=()).moves_at(0, 1.0) == []


def test_moves_of_one_level_follow_each_other():
    """First the particle, then its channel: the second starts from the answer of the first."""
    z = rotate_180(wrong_channel(IMAGE))
    after, rows = applied(moves(image_prior(False), OPERATOR, "flip", "channels"), state_of(z, Y))
    assert [row["move"] for row in rows] == ["flip", "channels"]
    assert [row["accepted"] for row in rows] == [[True], [True]]
    torch.testing.assert_close(after.z0_y, IMAGE)
    assert rows[1]["plausibility_before"] == pytest.approx(rows[0]["plausibility_after"])


@pytest.mark.parametrize("density", [True, False])
@pytest.mark.parametrize("move", MOVES)
def test_diverged_masked_and_broken_particles_are_left_alone(move, density):
    z = near(rotate_180(IMAGE), 6, scale=0.1)
    z[1, 0, 0, 0], z[2, 1] = NAN, math.inf
    z[5] = wrong_channel(normal(1, *IMAGE.shape[1:], seed=2))[0]
    state = dataclasses.replace(
        state_of(z, Y, sigma=3.0),
        diverged=torch.tensor([False, False, False, True, False, False]),
        masked=torch.tensor([False, False, False, False, True, False]),
    )
    hook = moves(image_prior(density), OPERATOR, move, crossover_ratio=1.01)
    after, rows = applied(hook, state)
    assert len(rows) == 1 and set(rows[0]["particle_ids"]) <= {0, 5}
    for i in (1, 2, 3, 4):
        assert torch.equal(after.z0_y[i].nan_to_num(7), z[i].nan_to_num(7)) and after.loss[i] == -1
    healthy, _ = applied(hook, state_of(z[[0, 5]], Y, ids=[0, 5], sigma=3.0))
    torch.testing.assert_close(after.z0_y[[0, 5]], healthy.z0_y)
    everyone_lost = dataclasses.replace(state, diverged=torch.ones(6, dtype=torch.bool))
    assert applied(hook, everyone_lost) == (everyone_lost, [])


def test_moves_to_what_is_not_finite_are_refused():
    class Broken(torch.nn.Module):
        def encode(self, x):
            return x / 0

        def decode(self, z):
            return z

    prior = prior_of(mixture([1.0], [IMAGE[0]], 0.3), tuple(IMAGE.shape[1:]), Broken())
    z = near(rotate_180(IMAGE), 2)
    for move in ("flip", "window"):
        after, (row,) = applied(moves(prior, OPERATOR, move), state_of(z, Y, sigma=3.0))
        assert row["accepted"] == [False, False] and torch.equal(after.z0_y, z)


def small_run(hooks, ids=(0, 1, 2), info=None):
    prior = prior_of(mixture([0.5, 0.5], [IMAGE[0], rotate_180(IMAGE)[0]], 0.3), tuple(IMAGE.shape[1:]))
    loop = LatentDAPS(prior, OPERATOR, settings(), hooks(prior))
    return loop.sample(Y, ParticleStreams(42, 0), list(ids), info)


WITHOUT_CROSSOVER = ("window", "channels", "conjugate", "flip")


def test_refused_moves_change_no_other_random_number():
    """A ratio of -infinity refuses everything; every other stream draws what it draws in the plain run."""

    def hooks(prior):
        hook = moves(prior, OPERATOR, "channels", "conjugate", "flip", sigma_max=99.0, sigma_min=0.0)
        hook._metropolis = lambda move, log_ratio, state: torch.zeros_like(state.diverged)
        return [hook]

    info = Info()
    refused, plain = small_run(hooks, info=info), small_run(lambda prior: [])
    assert len(info.rows["symmetry"]) == 3 * LEVELS
    assert_same(refused, plain)
    assert_same(small_run(lambda prior: [moves(prior, OPERATOR)]), plain)


def test_each_particle_moves_as_if_it_were_alone():
    def hooks(prior):
        return [moves(prior, OPERATOR, *WITHOUT_CROSSOVER, sigma_max=99.0, sigma_min=0.0, window_sigma=2.0)]

    info = Info()
    together = small_run(hooks, info=info)
    assert any(any(row["accepted"]) for row in info.rows["symmetry"] if row["move"] in ("flip", "channels"))
    assert_same(small_run(hooks, ids=[2]), together, [2], exact=False)
    assert_same(small_run(hooks, ids=[2, 0, 1]), together, [2, 0, 1], exact=False)
    assert not torch.allclose(together.z0_y, small_run(lambda prior: []).z0_y)


# --- Keys, plan and records ------------------------------------------------------------------------------------------

REFUSED = {
    "unknown": ({"symmetry_moves": ["mirror"]}, r"symmetry_moves=\[mirror\]: allowed are window, channels"),
    "twice": ({"symmetry_moves": ["flip", "flip"]}, r"symmetry_moves=\[flip,flip\]: allowed are .* at most once"),
    "alone": ({"symmetry_moves": ["crossover"], "num_samples": 1}, "crossover .* num_samples of at least 2"),
    "range": ({"symmetry_sigma_min": 4.0}, "symmetry_sigma_max=3: must be at least 4"),
    "negative": ({"symmetry_sigma_min": -1.0}, "symmetry_sigma_min=-1"),
    "window": ({"symmetry_window_sigma": NAN}, "symmetry_window_sigma=nan"),
    "every": ({"symmetry_every": 0}, "symmetry_every=0: must be at least 1"),
    "margin": ({"symmetry_margin": 1.5}, "symmetry_margin=1.5: must be at least 0 and at most 1"),
    "tolerance": ({"symmetry_loss_tolerance": -0.1}, "symmetry_loss_tolerance=-0.1"),
    "draws": ({"symmetry_draws": 0}, "symmetry_draws=0"),
    "tau": ({"symmetry_tau": 0.0}, "symmetry_tau=0: must be greater than 0"),
    "ratio": ({"symmetry_crossover_ratio": 0.9}, "symmetry_crossover_ratio=0.9: must be at least 1"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_values_that_no_move_could_run_with(keys, message):
    with pytest.raises(SettingsError, match=message):
        validate(RunSettings(**keys))


def test_an_operator_without_the_flip_is_refused():
    with pytest.raises(SettingsError, match=r"symmetry_moves=\[flip\]: the 180-degree flip is no symmetry .* matrix"):
        build_hook_plan(RunSettings(symmetry_moves=["flip"]), *problem(), PATH, CPU)
    plan = build_hook_plan(RunSettings(), *problem(), PATH, CPU)
    assert not any(isinstance(h, SymmetryMoves) for h in plan.hooks(measurement(), PhaseClock(CPU)))
    assert symmetry_record(plan, Info()) is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"symmetry_moves": ["flip"], "symmetry_sigma_max": 0.4}, "flip has no level: .* symmetry_sigma_max=0.4"),
        (
            {"symmetry_moves": ["flip", "window"], "symmetry_every": 1, "symmetry_window_sigma": 9},
            "window has no level: .* of at least",
        ),
        ({"symmetry_moves": ["flip"], "symmetry_every": 7}, "flip has no level: .* every 7th of 5 levels"),
    ],
)
def test_a_move_without_a_level_is_refused(keys, message):
    with pytest.raises(SettingsError, match=message):
        build_hook_plan(RunSettings(**keys), image_prior(), OPERATOR, PATH, CPU)


def test_hook_gets_what_the_keys_say_and_comes_before_pruning():
    keys = RunSettings(
        symmetry_moves=["window", "flip"],
        symmetry_sigma_max=3.5,
        symmetry_sigma_min=0.2,
        symmetry_window_sigma=2.5,
        symmetry_every=1,
        symmetry_margin=0.1,
        symmetry_loss_tolerance=0.3,
        symmetry_draws=3,
        symmetry_crossover_ratio=1.7,
        pruning_step=600,
        optimization_step=400,
    )
    given = {
        "moves": ("window", "flip"),
        "sigma_max": 3.5,
        "sigma_min": 0.2,
        "window_sigma": 2.5,
        "every": 1,
        "margin": 0.1,
        "loss_tolerance": 0.3,
        "draws": 3,
        "tau": OPERATOR.noise_sigma,
        "crossover_ratio": 1.7,
    }
    hooks = build_hook_plan(keys, image_prior(), OPERATOR, PATH, CPU).hooks(Y, PhaseClock(CPU))
    assert isinstance(hooks[0], SymmetryMoves) and len(hooks) > 2
    assert dataclasses.asdict(hooks[0].settings) == given
    keys = dataclasses.replace(keys, symmetry_tau=0.4)
    hooks = build_hook_plan(keys, image_prior(), OPERATOR, PATH, CPU).hooks(Y, PhaseClock(CPU))
    assert hooks[0].settings.tau == 0.4


# --- The command line on the tiny prior ------------------------------------------------------------------------------


@pytest.fixture
def tiny_run(tiny_prior, image_folder, tmp_path, monkeypatch):
    """Call it with overrides: a run on one image; its float results and its metrics."""
    monkeypatch.setattr("runs.reconstruct.contact_sheet", lambda path, rows, heading: path.write_text(heading))

    def start(name, *overrides):
        given = ["model=embedded", f"model.path={tiny_prior}", "data=folder", f"data.dir={image_folder}", *QUICK]
        given += ["data.end_id=1", "save_trajectory=false", f"save_dir={tmp_path}", f"name={name}"]
        outcome = reconstruct(*given, "sampler.annealing.num_steps=5", "num_samples=2", *overrides)
        assert outcome.status == 0, outcome.err
        with np.load(tmp_path / name / "floats" / "00000.npz") as arrays:
            return arrays["estimates"], metrics_schema.load(tmp_path / name / "metrics.json")

    return start


def test_runs_with_and_without_moves(tiny_run):
    plain, metrics = tiny_run("plain")
    assert metrics["symmetry"] == {"moves": [], "seconds": 0.0, "per_image": []}
    chosen = ["window", "channels", "conjugate", "flip"]
    keys = [f"symmetry_moves=[{','.join(chosen)}]", "symmetry_every=1", "symmetry_margin=0", "symmetry_sigma_min=0.1"]
    moved, metrics = tiny_run("moved", *keys, "symmetry_loss_tolerance=1e9")
    rows = metrics["symmetry"]["per_image"]
    assert metrics["symmetry"]["moves"] == chosen and metrics["symmetry"]["seconds"] > 0
    assert {row["move"] for row in rows} >= {"window", "conjugate", "flip"}
    assert {row["particle_id"] for row in rows} == {0, 1} and {row["image_id"] for row in rows} == {0}
    assert all(row["sigma"] >= 3 if row["move"] == "window" else 0.1 <= row["sigma"] <= 3 for row in rows)
    assert all(
        row["rule"] == {"window": "always", "conjugate": "likelihood"}.get(row["move"], "denoising") for row in rows
    )
    assert all(math.isfinite(row["loss_after"]) for row in rows)
    assert not np.array_equal(moved, plain)
