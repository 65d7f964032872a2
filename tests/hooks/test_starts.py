import json

import metrics_schema
import pytest
import torch
from planned_runs import plan_for
from sampler_support import assert_same, loop, measurement, problem, run, settings
from tiny import QUICK, command

from particledaps.checks import Checks, SettingsError
from particledaps.operators.fienup import FienupSettings, solve
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.particles.starts import Settings, build_start
from particledaps.priors.autoencoder import IdentityAutoencoder
from particledaps.priors.prior import Prior
from particledaps.settings.hook_keys import cut
from particledaps.streams import ParticleStreams
from run_settings import HookKeys, check_hooks
from sampler import Info, Start

SHAPE = (3, 8, 8)
PATH = torch.tensor([10.0, 6.0, 3.0, 2.0, 0.5, 0.0])
CPU = torch.device("cpu")


class Doubling(IdentityAutoencoder):
    """Tells a latent from an image."""

    def encode(self, x):
        return 2 * x


def pixels():
    return Prior("pixels", Doubling(), torch.nn.Identity(), SHAPE, SHAPE), PhaseRetrieval()


def measured(seed=0):
    operator = PhaseRetrieval()
    generator = torch.Generator().manual_seed(seed)
    return operator.measure(2 * torch.rand(1, *SHAPE, generator=generator) - 1, generator)


def warm(**keys):
    keys = {"start": "hio", "start_iterations": 20} | keys
    return build_start(cut("start", Settings, HookKeys(**keys)), *pixels(), PATH)


# --- In the loop -----------------------------------------------------------------------------------------------------


def test_particles_begin_at_their_own_image_and_level():
    z0 = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    run_settings, streams = settings(), ParticleStreams(42, 0)
    state = loop(run_settings).start(measurement(), streams, [0, 1, 2, 3], Start(z0, 2))
    noise = streams.normal([0, 1, 2, 3], "start", 0, z0)
    torch.testing.assert_close(state.z, z0 + run_settings.path[2] * noise, rtol=1e-12, atol=1e-12)
    assert state.level.tolist() == [2] * 4
    assert torch.equal(state.z0_y, z0)


def test_only_the_levels_from_there_on_run():
    z0 = torch.zeros(2, 3, 1, 1, dtype=torch.float64)
    sampler = loop(settings())
    state = sampler.start(measurement(), ParticleStreams(42, 0), [0, 1], Start(z0, 3))
    assert [(s.step, s.t) for s in sampler.levels(state, Info())] == [(3, 400.0), (4, 200.0)]


def test_a_start_at_zero_at_the_first_level_is_the_plain_run():
    z0 = torch.zeros(4, 3, 1, 1, dtype=torch.float64)
    state = loop(settings()).sample(measurement(), ParticleStreams(42, 0), [0, 1, 2, 3], Info(), Start(z0, 0))
    assert_same(state, run(settings()))


def test_a_start_elsewhere_is_not():
    z0 = torch.full((4, 3, 1, 1), 3.0, dtype=torch.float64)
    state = loop(settings()).sample(measurement(), ParticleStreams(42, 0), [0, 1, 2, 3], Info(), Start(z0, 4))
    assert (state.z0_y - run(settings()).z0_y).abs().max() > 1e-3


# --- From a classical solver -----------------------------------------------------------------------------------------


def test_noise_needs_no_solver():
    assert warm(start="noise") is None
    assert plan_for(*problem()).warm_start is None


@pytest.mark.parametrize(("sigma", "level"), [(100.0, 0), (10.0, 0), (9.99, 1), (3.0, 2), (2.99, 3), (0.5, 4)])
def test_the_first_level_as_low_as_start_sigma(sigma, level):
    assert warm(start_sigma=sigma).level == level


@pytest.mark.parametrize("rule", ["hio", "raar"])
def test_particles_take_the_lowest_residuals_in_order(rule):
    y, streams = measured(), ParticleStreams(1, 7)
    start, record = warm(start=rule, start_restarts=6)(y, streams, [0, 1, 2, 3])
    noise = streams.normal(list(range(6)), "warm_start", 0, y.expand(6, *y.shape[1:]))
    images, residuals = solve(PhaseRetrieval(), y, noise, SHAPE[1:], FienupSettings(rule, 20))
    best = sorted(range(6), key=residuals.tolist().__getitem__)[:4]
    torch.testing.assert_close(start.z0, 2 * images[best], rtol=0, atol=1e-6)
    assert record["residuals"] == pytest.approx(sorted(residuals.tolist()))
    assert (record["rule"], record["level"], start.level) == (rule, 2, 2) and record["seconds"] > 0


def test_a_particle_starts_alone_as_in_company():
    y = measured()
    whole = warm()(y, ParticleStreams(1, 7), [0, 1, 2, 3])[0].z0
    assert torch.equal(warm()(y, ParticleStreams(1, 7), [3])[0].z0, whole[3:])
    assert torch.equal(warm()(y, ParticleStreams(1, 7), [2, 0])[0].z0, whole[[2, 0]])
    assert not torch.equal(warm()(y, ParticleStreams(2, 7), [3])[0].z0, whole[3:])
    assert not torch.equal(warm()(y, ParticleStreams(1, 8), [3])[0].z0, whole[3:])


# --- Refusals --------------------------------------------------------------------------------------------------------


def problems(**keys):
    checks = Checks()
    check_hooks(HookKeys(**keys), 4, checks)
    return checks.problems


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"start": "zeros"}, ("start=zeros", "noise, hio, raar")),
        ({"start_sigma": 0.0}, ("start_sigma=0", "greater than 0")),
        ({"start_restarts": 0}, ("start_restarts=0", "at least 1")),
        ({"start_iterations": 0}, ("start_iterations=0", "at least 1")),
        ({"start": "hio", "start_restarts": 3}, ("start_restarts=3", "num_samples=4")),
    ],
)
def test_values_that_cannot_work_are_refused(keys, words):
    (message,) = problems(**keys)
    assert all(word in message for word in words)


def test_fewer_restarts_than_particles_do_not_matter_to_noise():
    assert problems(start_restarts=3) == []


def test_an_operator_without_a_solver_is_refused():
    with pytest.raises(SettingsError, match="start=hio: there is no classical solver for the operator matrix"):
        plan_for(*problem(), start="hio")


def test_a_path_that_does_not_get_there_is_refused():
    with pytest.raises(SettingsError, match=r"start_sigma=0\.4: .* the last has sigma = 0\.5"):
        warm(start_sigma=0.4)


def planned(**keys):
    """Levels have t = 1000, 800, 600, 400, 200; sigma 3 is at t = 600."""
    return plan_for(*pixels(), PATH, start="hio", **keys)


EVERY = {"optimization_when": "every"}


@pytest.mark.parametrize("keys", [{"pruning_step": 800}, {"optimization_step": 800, **EVERY}])
def test_hooks_before_the_start_are_refused(keys):
    with pytest.raises(SettingsError, match=r"_step=800: .*begins later, at t = 600; use .*_step=600 or less"):
        planned(**keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"symmetry_moves": ["window"], "symmetry_every": 1, "symmetry_window_sigma": 4.0}, "window has no level"),
        (
            {"repulsion_scale": 0.1, "repulsion_features": "latent", "repulsion_sigma_break": 3.5},
            r"repulsion_sigma_break=3\.5: .* begins at sigma = 3",
        ),
    ],
)
def test_hooks_that_only_act_before_the_start_are_refused(keys, message):
    with pytest.raises(SettingsError, match=message):
        planned(**keys)
    assert planned(**keys, restart_rounds=1, restart_sigmas=[6.0]).warm_start.level == 2  # children do go there


@pytest.mark.parametrize(
    "keys", [{"pruning_step": 799}, {"optimization_step": 600, **EVERY}, {"optimization_step": 800}]
)
def test_hooks_at_the_start_or_after_are_not(keys):
    assert planned(**keys).warm_start.level == 2


# --- The command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def overrides(tiny_prior, image_folder, tmp_path, no_sheets):
    model = ("model=embedded", f"model.path={tiny_prior}")
    data = ("data=folder", f"data.dir={image_folder}", "data.end_id=1", "save_trajectory=false")
    return (*model, *data, *QUICK, f"save_dir={tmp_path}", "name=warm", "num_samples=2")


def test_a_run_records_its_start(overrides, tmp_path):
    outcome = command("posterior_sample", *overrides, "start=hio", "start_sigma=9", "start_iterations=30")
    assert outcome.status == 0, outcome.err
    metrics = metrics_schema.load(tmp_path / "warm" / "metrics.json")
    (row,) = metrics["start"]["per_image"]
    assert (row["image_id"], row["rule"], row["level"]) == (0, "hio", 1)
    assert len(row["residuals"]) == 8 and row["residuals"] == sorted(row["residuals"])
    assert 0 < row["seconds"] < metrics["timing"]["total_seconds"]
    assert metrics["timing"]["phases"]["sampling"]["steps"] == 2  # of three levels
    record = json.loads((tmp_path / "warm" / "records" / "00000.json").read_text())
    assert record["start"]["residuals"] == row["residuals"]


def test_a_run_from_noise_records_none(overrides, tmp_path):
    assert command("posterior_sample", *overrides).status == 0
    assert metrics_schema.load(tmp_path / "warm" / "metrics.json")["start"] == {"per_image": []}
