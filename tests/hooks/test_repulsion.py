"""Repulsion as a hook of the loop: when, how much, and what it logs."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from analytic import F64, latent, normal
from sampler_support import (
    LEVELS,
    PRIOR_MEAN,
    SIGMA_MAX,
    SIGMA_MIN,
    Recorder,
    assert_same,
    full_state,
    loop,
    measurement,
    problem,
    run,
    settings,
)
from test_repulsion_spaces import bandwidths
from torch import nn

from particledaps.diffusion.pfode import DiffusionPFODE
from particledaps.diffusion.score import score
from particledaps.particles.feature_spaces import LatentSpace
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams
from repulsion import Repulsion, Settings, schedule_factor
from sampler import Info

PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)
TIMES = [1000.0, 800.0, 600.0, 400.0, 200.0]


def hook(path=PATH, prior=None, space=None, **changes):
    values = {"scale": 0.3, "unit": "raw", "schedule": "constant", "sigma_break": 0.0}
    prior, stop_at = prior or problem()[0], changes.pop("stop_at", -1)
    return Repulsion(prior, space or LatentSpace(prior), Settings(**values | changes), path, stop_at)


def state_at(level, count=4, path=PATH, seed=4):
    """Particles of the analytic problem at a level."""
    start = loop(settings()).start(measurement(), ParticleStreams(42, 0), range(count))
    z = latent(PRIOR_MEAN) + path[level].item() * normal(count, 3, 1, 1, seed=seed)
    time = 1000 * (len(path) - 1 - level) / (len(path) - 1)
    return dataclasses.replace(start, z=z, step=level, sigma=path[level].item(), t=time)


def strengths(repulsion, path=PATH):
    return [repulsion.strength(state_at(k, path=path)) for k in range(len(path) - 1)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule_runs_from_1000_to_the_first_level_that_is_off(schedule):
    path = edm_path(10, 10.0, 0.1)
    repulsion = hook(path, scale=2.0, schedule=schedule, sigma_break=path[4].item())
    progress = np.array([1, 3 / 4, 2 / 4, 1 / 4])  # t = 1000, 900, 800, 700 and the break at 600
    factor = {"constant": np.ones(4), "linear": progress, "cosine": (1 - np.cos(np.pi * progress)) / 2}[schedule]
    assert strengths(repulsion, path) == pytest.approx([*(2 * factor), *[0] * 6], rel=1e-12)


def test_schedule_ends():
    for t_break in (0.0, 200.0, 740.0):
        for schedule in ("constant", "linear", "cosine"):
            assert schedule_factor(schedule, 1000, t_break) == pytest.approx(1, abs=1e-15)
        for schedule in ("linear", "cosine"):
            assert schedule_factor(schedule, t_break, t_break) == 0
        middle = (1000 + t_break) / 2
        assert schedule_factor("linear", middle, t_break) == pytest.approx(0.5)
        assert schedule_factor("cosine", middle, t_break) == pytest.approx(0.5)
        assert schedule_factor("cosine", (3000 + t_break) / 4, t_break) == pytest.approx((1 + 0.5**0.5) / 2)


@pytest.mark.parametrize("first_off", range(LEVELS + 1))
def test_off_from_the_break_on(first_off):
    sigma_break = PATH[first_off].item()
    on = [strength > 0 for strength in strengths(hook(sigma_break=sigma_break))]
    assert on == [k < first_off for k in range(LEVELS)]
    just_below = sigma_break * (1 - 1e-12)
    on = [strength > 0 for strength in strengths(hook(sigma_break=just_below))]
    assert on == [k <= first_off for k in range(LEVELS)]


@pytest.mark.parametrize(("stop_at", "first_off"), [(-1, 5), (0, 5), (200, 4), (599, 3), (600, 2), (601, 2), (1000, 0)])
def test_off_once_optimisation_begins(stop_at, first_off):
    on = [strength > 0 for strength in strengths(hook(stop_at=stop_at))]
    assert on == [k < first_off for k in range(LEVELS)]


def test_times_of_the_loop_are_those_of_the_schedule():
    recorder = Recorder()
    info = Info()
    repelled = loop(settings(), [hook(schedule="linear", sigma_break=PATH[3].item()), recorder])
    repelled.sample(measurement(), ParticleStreams(42, 0), range(4), info)
    assert [row["scale"] for row in info.rows["repulsion"]] == pytest.approx([0.3, 0.2, 0.1])
    assert [s.drift is not None for s in recorder.seen["before_ode"]] == [True, True, True, False, False]
    assert repelled.ode._repulsion is None


def stein_by_hand(z):
    """The latent term by its sum, particle by particle."""
    f = z.flatten(1).numpy()
    distances = np.sqrt(((f[:, None] - f[None]) ** 2).sum(-1))
    bandwidth, rows = bandwidths(distances), []
    for i in range(len(f)):
        others = [j for j in range(len(f)) if j != i]
        weights = np.array([math.exp(-(distances[i, j] ** 2) / bandwidth[i]) for j in others])
        pushes = np.array([2 / bandwidth[i] * (f[i] - f[j]) for j in others])
        rows.append(weights @ pushes / weights.sum())
    return latent(np.array(rows))


@pytest.mark.parametrize("estimate", ["z0_hat", "z_t"])
@pytest.mark.parametrize("level", [0, 3])
def test_term_is_taken_at_the_clean_estimate_or_the_scaled_noisy_latent(estimate, level):
    state = state_at(level)
    term, scale = hook(on=estimate).before_ode(state, Info()).drift
    clean = problem()[0].denoiser(state.z, state.sigma)
    at = clean if estimate == "z0_hat" else state.z / math.sqrt(1 + state.sigma**2)
    torch.testing.assert_close(term, stein_by_hand(at), rtol=1e-9, atol=1e-12)
    assert scale.tolist() == [0.3] * 4


def test_scale_enters_the_drift_once():
    state, (prior, _) = hook().before_ode(state_at(1), Info()), problem()
    ode = DiffusionPFODE(prior.denoiser)
    plain = ode.derivative(state.z, state.sigma)
    ode.set_repulsion(*state.drift)
    term = stein_by_hand(prior.denoiser(state.z, state.sigma))
    torch.testing.assert_close(
        ode.derivative(state.z, state.sigma), plain - state.sigma * 0.3 * term, rtol=1e-9, atol=1e-12
    )


def one_step_displacement(level, **changes):
    """What repulsion at one level adds to ``z0_hat``, where the ODE is a single Euler step from sigma to 0."""
    run_settings = settings(inner_path=lambda sigma: torch.tensor([sigma, 0.0], dtype=F64))
    answers = []
    for hooks in ([], [hook(**changes)]):
        recorder = Recorder()
        sampler = loop(run_settings, [*hooks, recorder])
        sampler._level(dataclasses.replace(state_at(level), level=torch.full((4,), level)), level, Info())
        answers.append(recorder.seen["after_mcmc"][0].z0_hat)
    return answers[1] - answers[0]


@pytest.mark.parametrize("level", [0, 2])
def test_one_euler_step_moves_by_sigma_squared_times_scale_times_term(level):
    state = state_at(level)
    expected = state.sigma**2 * 0.3 * stein_by_hand(problem()[0].denoiser(state.z, state.sigma))
    moved = one_step_displacement(level)
    torch.testing.assert_close(moved, expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(one_step_displacement(level, scale=0.6), 2 * moved, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("level", [0, 3])
def test_ratio_is_reached_by_every_particle(level):
    """One Euler step without repulsion moves by sigma^2 |score|; the addition is the asked share of it."""
    state, (prior, _) = state_at(level, count=5), problem()
    term, scale = hook(unit="ratio", scale=0.25).before_ode(state, Info()).drift
    asked = 0.25 * score(prior.denoiser, state.z, state.sigma).flatten(1).norm(dim=1)
    torch.testing.assert_close((scale[:, None] * term.flatten(1)).norm(dim=1), asked, rtol=1e-10, atol=0)
    assert scale.std() > 0.01 * scale.mean()  # one factor for all would not do it


def test_ratio_of_identical_particles_is_finite():
    state = state_at(1)
    state = dataclasses.replace(state, z=state.z[:1].expand(4, 3, 1, 1))
    info = Info()
    term, scale = hook(unit="ratio").before_ode(state, info).drift
    assert (term == 0).all() and (scale == 0).all()
    assert info.rows["repulsion"][0]["ratio"] == 0


def test_one_particle_is_left_alone():
    state = state_at(0, count=1)
    assert hook(log=True).before_ode(state, Info()).drift is None
    assert_same(run(settings(), [hook()], ids=[2]), run(settings(), ids=[2]))


@pytest.mark.parametrize("unit", ["raw", "ratio"])
def test_masked_and_diverged_particles_feel_and_exert_nothing(unit):
    state, flags = state_at(1, count=5), torch.zeros(5, dtype=torch.bool)
    flags = {"masked": flags.clone(), "diverged": flags.clone()}
    flags["masked"][1], flags["diverged"][3] = True, True
    state, active, info, alone = dataclasses.replace(state, **flags), [0, 2, 4], Info(), Info()
    term, scale = hook(unit=unit).before_ode(state, info).drift
    expected_term, expected_scale = hook(unit=unit).before_ode(state[active], alone).drift
    torch.testing.assert_close(term[active], expected_term, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(scale[active], expected_scale, rtol=1e-12, atol=0)
    assert (term[[1, 3]] == 0).all() and (scale[[1, 3]] == 0).all()
    for row, other in zip(info.rows["repulsion"], alone.rows["repulsion"], strict=True):
        del row["seconds"], other["seconds"]
        assert row == pytest.approx(other)


def test_one_active_particle_among_masked_ones_is_left_alone():
    state = dataclasses.replace(state_at(1), masked=torch.tensor([True, True, False, True]))
    assert hook().before_ode(state, Info()).drift is None


@pytest.mark.parametrize(("unit", "scale"), [("raw", 0.3), ("ratio", 0.3), ("raw", 0.0)])
def test_logged_row(unit, scale):
    state, info, (prior, _) = state_at(2), Info(), problem()
    hook(unit=unit, scale=scale, log=True).before_ode(state, info)
    slope = score(prior.denoiser, state.z, state.sigma).flatten(1).numpy()
    clean = state.z.flatten(1).numpy() + state.sigma**2 * slope
    term = stein_by_hand(latent(clean)).flatten(1).numpy()
    pairs = [np.linalg.norm(clean[i] - clean[j]) for i in range(4) for j in range(i)]
    norms, slopes = np.linalg.norm(term, axis=1), np.linalg.norm(slope, axis=1)
    (row,) = info.rows["repulsion"]
    assert row.pop("seconds") > 0
    assert row == pytest.approx(
        {
            "step": 2,
            "sigma": PATH[2].item(),
            "t": 600.0,
            "scale": scale,
            "mean_pairwise_distance": np.mean(pairs),
            "repulsion_norm": norms.mean() if scale else 0.0,  # where it is off only distances are taken
            "score_norm": slopes.mean(),
            "ratio": scale if unit == "ratio" else (scale * norms / slopes).mean(),
        },
        rel=1e-9,
    )


def test_log_only_is_the_plain_run_with_a_row_a_level():
    info = Info()
    logged = loop(settings(), [hook(scale=0.0, log=True)])
    assert_same(logged.sample(measurement(), ParticleStreams(42, 0), range(4), info), run(settings()))
    assert [row["t"] for row in info.rows["repulsion"]] == pytest.approx(TIMES)
    assert [row["scale"] for row in info.rows["repulsion"]] == [0] * 5


def test_log_goes_on_where_repulsion_is_off():
    info = Info()
    loop(settings(), [hook(log=True, sigma_break=PATH[2].item())]).sample(
        measurement(), ParticleStreams(42, 0), range(4), info
    )
    assert [row["scale"] > 0 for row in info.rows["repulsion"]] == [True, True, False, False, False]


def test_scale_zero_calls_nothing():
    state = full_state()
    assert Repulsion(None, None, Settings(), PATH).before_ode(state, Info()) is state


def test_repelled_particles_end_further_apart():
    def spread(state):
        return torch.pdist(state.z0_hat.flatten(1)).mean()

    runs = [Recorder(), Recorder()]
    run(settings(), [runs[0]])
    run(settings(), [hook(unit="ratio", scale=0.5), runs[1]])
    plain, repelled = (recorder.seen["after_mcmc"][0] for recorder in runs)
    assert spread(repelled) > 1.05 * spread(plain)
    assert not torch.equal(runs[0].seen["at_end"][0].z0_y, runs[1].seen["at_end"][0].z0_y)


class NaNForOne(nn.Module):
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, z, sigma):
        result = self.denoiser(z, sigma).clone()
        result[1] = torch.nan
        return result


def test_a_particle_that_diverges_in_this_level_leaves_its_neighbours_alone():
    """Nobody has marked it yet when the term is computed."""
    prior, state, keep = problem()[0], state_at(1), [0, 2, 3]
    hurt = dataclasses.replace(prior, denoiser=NaNForOne(prior.denoiser))
    term, scale = hook(prior=hurt).before_ode(state, Info()).drift
    expected_term, expected_scale = hook().before_ode(state[keep], Info()).drift
    torch.testing.assert_close(term[keep], expected_term, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(scale[keep], expected_scale, rtol=1e-12, atol=0)
