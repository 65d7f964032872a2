"""``preset=auto`` measures the sampler's values once a run; ``preset=FILE`` pins them; both fill what nobody set."""

import json
import shutil

import numpy as np
import pytest
import yaml
from tiny import reconstruct, write_images
from tiny_checkpoints import MODELS, checkpoints  # noqa: F401 (fixture)

import session
import tuning

SMALL = ("sampler.annealing.num_steps=3", "num_samples=2", "data.end_id=1", "device=cpu", "save_trajectory=false")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 2, size=(32, 32))


@pytest.fixture
def run(images, tmp_path, no_sheets, checkpoints):  # noqa: F811
    """Call it with overrides, the name first."""
    common = ("data=folder", f"data.dir={images}", f"save_dir={tmp_path}/results", f"model={MODELS['ldm_ffhq']}")
    prior = (f"model.path={checkpoints['ldm_ffhq']}", *SMALL)
    return lambda name, *overrides: reconstruct(*common, *prior, f"name={name}", *overrides)


@pytest.fixture
def measured(monkeypatch):
    """How often something was measured, in a way that takes no time."""
    calls = []
    values = {
        "annealing": {"schedule": "edm", "num_steps": 9, "sigma_max": 3.0, "sigma_min": 0.2},
        "ode": {"schedule": "edm", "num_steps": 1, "sigma_min": 0.001, "solver": "euler"},
        "mcmc": {"kernel": "admm", "num_steps": 4, "step_size": 1e-4, "step_size_min_ratio": 1.0, "momentum": 0.0}
        | {"tau": 0.06, "space": "pixel", "covariance": "measured"},
    }
    found = {"band": None, "noise_sigma": 0.05}
    monkeypatch.setattr(session, "tune", lambda *given: calls.append(given) or tuning.Tuned(values, found))
    return calls


def numbers(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    return metrics["measurement"]["per_image"][0]["loss"]


def test_auto_on_a_checkpoint_measures_and_its_file_pins(run, tmp_path):
    """The real measurement, of random weights: finite values, kept, and the same run when they are given."""
    outcome = run("auto", "preset=auto")
    assert outcome.status == 0, outcome.err
    results = tmp_path / "results"
    kept = yaml.safe_load((results / "auto" / "preset.yaml").read_text())
    chain, path = kept["sampler"]["mcmc"], kept["sampler"]["annealing"]
    assert chain["kernel"] == "admm" and chain["space"] == "pixel" and chain["tau"] >= 0.05
    assert 0 < path["sigma_min"] < path["sigma_max"] < 200
    stored = yaml.safe_load((results / "auto" / "config.yaml").read_text())["sampler"]
    assert stored["annealing"] == path | {"num_steps": 3}  # what the command line says goes first
    assert {name: stored["mcmc"][name] for name in chain} == chain
    assert "preset=auto: " in outcome.out and np.isfinite(numbers(results / "auto")).all()
    assert run("pinned", f"preset={results / 'auto' / 'preset.yaml'}").status == 0
    assert numbers(results / "pinned") == numbers(results / "auto")


def test_a_resumed_run_measures_nothing(run, tmp_path, measured, monkeypatch):
    assert run("auto", "preset=auto").status == 0 and len(measured) == 1
    monkeypatch.setattr(session, "measured_covariance", None)  # kept beside it
    again = run("auto", "preset=auto", "data.end_id=2")
    assert again.status == 0 and len(measured) == 1, again.err
    assert "finished before" in again.out


def test_a_damaged_covariance_is_measured_again(run, tmp_path, measured):
    assert run("auto", "preset=auto").status == 0
    path = tmp_path / "results" / "auto" / "covariance.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert run("auto", "preset=auto", "data.end_id=2").status == 0


def test_values_of_another_task_are_not_taken(run, tmp_path, measured):
    folder = tmp_path / "results" / "auto"
    assert run("auto", "preset=auto").status == 0
    for path in folder.iterdir():  # as if it had ended before its start
        if path.name != "preset.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run("auto", "preset=auto", "task.noise_sigma=0.1").status == 0 and len(measured) == 2


def test_a_run_of_its_own_is_not_tuned_afterwards(run, measured):
    assert run("plain", "sampler.mcmc.num_steps=2").status == 0
    outcome = run("plain", "sampler.mcmc.num_steps=2", "preset=auto")
    assert outcome.status == 2 and measured == []
    assert "holds a run without a preset of its own" in outcome.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is no preset"),
        ("nonsense", "is no preset"),
        ("sampler: {mcmc: {kernle: hmc}}", "kernle"),
        ("sampler: {mcmc: {tau: soft}}", "is no preset"),
        ("sampler: {chain: {tau: 1}}", "is no preset"),
        ("sampler: {mcmc: {tau: -1}}", "sampler.mcmc.tau=-1"),
    ],
)
def test_what_is_no_preset_is_refused(run, tmp_path, text, said):
    path = tmp_path / "own.yaml"
    if text is not None:
        path.write_text(text)
    outcome = run("own", f"preset={path}")
    assert outcome.status == 2 and said in outcome.err
