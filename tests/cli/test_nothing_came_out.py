"""A run without an answer says so with a status of its own, and its file can still be read."""

import dataclasses
import json

import metrics_schema
import numpy as np
import pytest
from tiny import captured

import sampler
from particledaps.settings.statuses import BAD_INPUT, NOTHING
from tools import parse_metrics


def test_every_particle_of_an_image_diverged(tiny_run, tiny_prior, faulty_prior):
    outcome = tiny_run(*faulty_prior("denoiser", tiny_prior, [0, 1, 2, 3]))
    assert outcome.status == NOTHING == 3
    assert "nothing came out of image 0, 1, 2: every particle diverged" in outcome.err
    metrics = metrics_schema.load(tiny_run.folder / "metrics.json")
    assert {r["state"] for r in metrics["status"]["per_image"]} == {"diverged"}
    again = tiny_run(*faulty_prior("denoiser", tiny_prior, [0, 1, 2, 3]))
    assert again.status == NOTHING and "skipped" in again.out
    table = captured(lambda: parse_metrics.main([str(tiny_run.folder)]))
    assert table.status == 0 and "tiny" in table.out, table.err


def test_some_images_came_out(tiny_run, tiny_prior, monkeypatch):
    original = sampler.LatentDAPS.sample

    def sample(self, y, streams, *rest):
        state = original(self, y, streams, *rest)
        return state if streams.image_id != 1 else _all_diverged(state)

    monkeypatch.setattr(sampler.LatentDAPS, "sample", sample)
    outcome = tiny_run()
    assert outcome.status == NOTHING and "nothing came out of image 1: " in outcome.err
    assert "lower sampler.mcmc.step_size=0.0015" in outcome.err
    metrics = metrics_schema.load(tiny_run.folder / "metrics.json")
    assert [r["state"] for r in metrics["status"]["per_image"]] == ["ok", "diverged", "ok"]


def _all_diverged(state):
    return dataclasses.replace(state, diverged=~state.diverged)


def test_the_networks_are_named_where_they_are_at_fault(tiny_run, tiny_prior, faulty_prior):
    outcome = tiny_run(*faulty_prior("denoiser", tiny_prior, [0]), "num_samples=1", "data.end_id=1")
    assert outcome.status == NOTHING and "networks return numbers that are not finite" in outcome.err


@pytest.mark.parametrize("size", [1e30, 1e20])
def test_an_absurd_measurement_is_refused_before_anything_is_sampled(tiny_run, tmp_path, sampled, size):
    arguments = ("data.dir=null", f"data.measurement={tmp_path / 'y.npz'}", "task=down_sampling")
    np.savez(tmp_path / "y.npz", y=np.full((1, 3, 4, 4), size))
    outcome = tiny_run(*arguments)
    assert outcome.status == BAD_INPUT and sampled == []
    assert f"values up to {size:.3g} give no finite loss" in outcome.err


def test_a_file_of_an_absurd_measurement_is_still_a_file(tiny_run, tmp_path):
    """Older runs may hold a floor that is no number."""
    assert tiny_run("data.end_id=1").status == 0
    path = tiny_run.folder / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["measurement"]["per_image"][0] |= {
        "noise_floor": None,
        "noise_floor_std": None,
        "fingerprint": [None, None],
    }
    path.write_text(json.dumps(metrics))
    assert captured(lambda: parse_metrics.main([str(tiny_run.folder)])).status == 0


def test_a_loss_many_floors_up_deserves_a_line(tiny_run):
    outcome = tiny_run("task.noise_sigma=1e-4", "data.end_id=1")
    assert outcome.status == 0
    assert "\nnot explained: 0 (loss " in outcome.out and "floors): is the measurement in the convention" in outcome.out
