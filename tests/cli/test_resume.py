import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import metrics_schema
import numpy as np
import pytest
from test_run import comparable, estimates

import sampler

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def broken(monkeypatch):
    """Exceptions by image id: the sampler raises them in the middle of that image, until they are removed."""
    errors, original = {}, sampler.LatentDAPS.levels

    def levels(self, state, info):
        for position, level in enumerate(original(self, state, info)):
            if position == 1 and state.streams.image_id in errors:
                raise errors[state.streams.image_id]
            yield level

    monkeypatch.setattr(sampler.LatentDAPS, "levels", levels)
    return errors


def test_finished_images_are_skipped(tiny_run, sampled):
    tiny_run()
    before = metrics_schema.load(tiny_run.folder / "metrics.json")
    assert sampled == [0, 1, 2]
    outcome = tiny_run()
    assert sampled == [0, 1, 2]
    assert outcome.out.count("skipped") == 3
    after = metrics_schema.load(tiny_run.folder / "metrics.json")
    before["metadata"].pop("timestamp"), after["metadata"].pop("timestamp")
    assert before == after


def test_a_missing_record_is_made_again_and_the_file_is_the_same(baseline, tiny_run, sampled):
    tiny_run()
    (tiny_run.folder / "records" / "00001.json").unlink()
    (tiny_run.folder / "metrics.json").unlink()
    tiny_run()
    assert sampled == [0, 1, 2, 1]
    assert comparable(tiny_run.folder) == comparable(baseline[1])


def test_more_images_join_a_finished_run(tiny_run, sampled):
    tiny_run("data.end_id=1")
    tiny_run("data.end_id=2")
    assert sampled == [0, 1]
    assert metrics_schema.load(tiny_run.folder / "metrics.json")["metadata"]["image_ids"] == [0, 1]


def test_interrupt_keeps_what_is_finished_and_the_same_command_goes_on(baseline, tiny_run, broken, sampled):
    broken[1] = KeyboardInterrupt()
    outcome = tiny_run()
    assert outcome.status == 130
    assert "interrupted" in outcome.err and "Traceback" not in outcome.err
    assert [p.name for p in (tiny_run.folder / "records").iterdir()] == ["00000.json"]
    assert metrics_schema.load(tiny_run.folder / "metrics.json")["metadata"]["image_ids"] == [0]
    broken.clear()
    assert tiny_run().status == 0
    assert sampled == [0, 1, 1, 2]
    assert comparable(tiny_run.folder) == comparable(baseline[1])


def test_a_failed_image_is_recorded_and_tried_again(baseline, tiny_run, broken, sampled):
    broken[1] = RuntimeError("CUDA out of memory")
    outcome = tiny_run()
    assert outcome.status == 1
    assert "image 1 failed" in outcome.err
    metrics = metrics_schema.load(tiny_run.folder / "metrics.json")
    assert metrics["metadata"]["image_ids"] == [0, 2]
    states = {r["image_id"]: (r["state"], r["error"]) for r in metrics["status"]["per_image"]}
    assert states[1] == ("failed", "RuntimeError: CUDA out of memory")
    assert states[0] == states[2] == ("ok", None)
    broken.clear()
    assert tiny_run().status == 0
    assert sampled == [0, 1, 2, 1]
    assert comparable(tiny_run.folder) == comparable(baseline[1])


def test_every_image_failed(tiny_run, broken):
    broken[0] = RuntimeError("out of memory")
    outcome = tiny_run("data.end_id=1")
    assert outcome.status == 1
    metrics = metrics_schema.load(tiny_run.folder / "metrics.json")
    assert metrics["metadata"]["image_ids"] == []
    assert metrics["psnr"] is None


def test_a_bug_is_not_taken_for_a_failed_image(tiny_run, broken):
    broken[0] = TypeError("a bug")
    with pytest.raises(TypeError, match="a bug"):
        tiny_run("data.end_id=1")


def test_a_diverged_particle_leaves_its_neighbours_alone(baseline, tiny_run, tiny_prior, faulty_prior):
    outcome = tiny_run(*faulty_prior("denoiser", tiny_prior, [1]), "data.end_id=1")
    assert outcome.status == 0
    metrics = metrics_schema.load(tiny_run.folder / "metrics.json")
    status = metrics["status"]["per_image"][0]
    assert (status["state"], status["diverged_particles"]) == ("ok", [1])
    assert metrics["psnr"]["per_image"][0]["particle_ids"] == [0, 2, 3]
    assert metrics["metadata"]["num_samples_final"] == 3
    assert np.array_equal(estimates(tiny_run.folder), estimates(baseline[1])[[0, 2, 3]])
    assert not (tiny_run.folder / "samples" / "00000_particle1.png").exists()


@pytest.mark.parametrize("factory", ["denoiser", "decoder"])
def test_all_particles_diverged(drawn_run, tiny_prior, faulty_prior, factory):
    outcome = drawn_run(*faulty_prior(factory, tiny_prior, [0, 1, 2, 3]), "data.end_id=1", "save_trajectory=true")
    assert outcome.status == 3, outcome.err
    metrics = metrics_schema.load(drawn_run.folder / "metrics.json")
    assert [r["state"] for r in metrics["status"]["per_image"]] == ["diverged"]
    assert [r["samples"] for r in metrics["psnr"]["per_image"]] == [[]]
    assert metrics["selection"]["per_image"] == []
    assert metrics["psnr"]["overall"]["best_mean"] is None
    assert (drawn_run.folder / "sheets" / "00000.png").exists()


def test_an_answer_that_decodes_to_infinity_is_diverged(baseline, tiny_run, tiny_prior, faulty_prior):
    tiny_run(*faulty_prior("decoder", tiny_prior, [0]), "data.end_id=1")
    metrics = metrics_schema.load(tiny_run.folder / "metrics.json")
    assert metrics["status"]["per_image"][0]["diverged_particles"] == [0]
    assert np.array_equal(estimates(tiny_run.folder), estimates(baseline[1])[1:])


def test_ctrl_c_in_the_terminal(arguments, tmp_path):
    command = [sys.executable, ROOT / "posterior_sample.py", *arguments, f"save_dir={tmp_path}"]
    slow = ["save_trajectory=false", "sampler.annealing.num_steps=100"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(  # a shell's background job ignores Ctrl-C, and so would its children
        [*command, *slow],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    first, deadline = tmp_path / "tiny" / "records" / "00000.json", time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("posterior_sample.py: interrupted")
    finished = metrics_schema.load(tmp_path / "tiny" / "metrics.json")["metadata"]["image_ids"]
    assert finished in ([0], [0, 1])
    assert json.loads(first.read_text())["state"] == "ok"
