"""Symmetry moves as a user asks for them: keys, plan, records, command line."""

import dataclasses
import math

import metrics_schema
import numpy as np
import pytest
from planned_runs import plan_for
from sampler_support import problem
from symmetry_support import CPU, OPERATOR, image_prior
from tiny import QUICK, reconstruct

from particledaps.checks import SettingsError
from particledaps.runs.clock import PhaseClock
from run_settings import RunSettings, validate
from sampler import Info
from symmetry import SymmetryMoves

# --- Keys, plan and records ------------------------------------------------------------------------------------------

REFUSED = {
    "unknown": ({"symmetry_moves": ["mirror"]}, r"symmetry_moves=\[mirror\]: allowed are window, channels"),
    "twice": ({"symmetry_moves": ["flip", "flip"]}, r"symmetry_moves=\[flip,flip\]: allowed are .* at most once"),
    "alone": ({"symmetry_moves": ["crossover"], "num_samples": 1}, "crossover .* num_samples of at least 2"),
    "range": ({"symmetry_sigma_min": 4.0}, "symmetry_sigma_max=3: must be at least 4"),
    "negative": ({"symmetry_sigma_min": -1.0}, "symmetry_sigma_min=-1"),
    "window": ({"symmetry_window_sigma": float("nan")}, "symmetry_window_sigma=nan"),
    "every": ({"symmetry_every": 0}, "symmetry_every=0: must be at least 1"),
    "margin": ({"symmetry_margin": 1.5}, "symmetry_margin=1.5: must be at least 0 and at most 1"),
    "tolerance": ({"symmetry_loss_tolerance": -0.1}, "symmetry_loss_tolerance=-0.1"),
    "draws": ({"symmetry_draws": 0}, "symmetry_draws=0"),
    "tau": ({"symmetry_tau": 0.0}, "symmetry_tau=0: must be greater than 0"),
    "children": ({"restart_conjugate": 5}, "restart_conjugate=5: there are only restart_children=4 a round"),
    "one round": (
        {"restart_conjugate": 1, "restart_rounds": 1},
        "restart_conjugate=1: .* use restart_rounds=2 or more",
    ),
    "ratio": ({"symmetry_crossover_ratio": 0.9}, "symmetry_crossover_ratio=0.9: must be at least 1"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_values_that_no_move_could_run_with(keys, message):
    with pytest.raises(SettingsError, match=message):
        validate(RunSettings(**keys))


def test_an_operator_without_the_flip_is_refused():
    with pytest.raises(SettingsError, match=r"symmetry_moves=\[flip\]: the 180-degree flip is no symmetry .* matrix"):
        plan_for(*problem(), symmetry_moves=["flip"])
    with pytest.raises(SettingsError, match=r"restart_conjugate=1: the 180-degree flip is no symmetry .* matrix"):
        plan_for(*problem(), restart_rounds=2, restart_conjugate=1)
    plan = plan_for(*problem(), restart_conjugate=1)
    assert not any(isinstance(h, SymmetryMoves) for h in plan.hooks(PhaseClock(CPU)))
    assert plan.record(Info(), [])["symmetry"] is None


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
        plan_for(image_prior(), OPERATOR, **keys)


def test_hook_gets_what_the_keys_say_and_comes_before_pruning():
    keys = dict(
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
        "tau": None,
        "crossover_ratio": 1.7,
    }
    hooks = plan_for(image_prior(), OPERATOR, **keys).hooks(PhaseClock(CPU))
    assert isinstance(hooks[0], SymmetryMoves) and len(hooks) > 2
    assert dataclasses.asdict(hooks[0].settings) == given and hooks[0].tau == OPERATOR.noise_sigma
    keys |= {"symmetry_tau": 0.4}
    hooks = plan_for(image_prior(), OPERATOR, **keys).hooks(PhaseClock(CPU))
    assert hooks[0].tau == 0.4


# --- The command line on the tiny prior ------------------------------------------------------------------------------


@pytest.fixture
def tiny_run(tiny_prior, image_folder, tmp_path, no_sheets):
    """Call it with overrides: a run on one image; its float results and its metrics."""

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
