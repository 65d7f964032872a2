"""Several processes in one folder: one identity owns it, and each image is done once."""

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
from test_run import comparable

from particledaps.runs.claims import this_process

ROOT = Path(__file__).resolve().parents[2]
LEVELS = 60
"""Long enough for processes that start together to meet."""


@pytest.fixture
def start(arguments, tmp_path):
    """Start a process of the command line on three images; ``.folder`` is where its results go."""

    def begin(*more):
        slow = ("save_trajectory=false", f"sampler.annealing.num_steps={LEVELS}", f"save_dir={tmp_path}")
        return subprocess.Popen(
            [sys.executable, ROOT / "posterior_sample.py", *arguments, *slow, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    begin.folder = tmp_path / "tiny"
    return begin


def finish(*processes):
    """Exit status and output of each."""
    outputs = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, out, err) for process, (out, err) in zip(processes, outputs, strict=True)]


def test_of_two_seeds_under_one_name_one_is_refused(start):
    outcomes = finish(start("seed=42"), start("seed=43"))
    assert sorted(status for status, _, _ in outcomes) == [0, 2]
    loser = next(err for status, _, err in outcomes if status == 2)
    assert "holds a run with another configuration (it differs in seed)" in loser
    metrics = metrics_schema.load(start.folder / "metrics.json")
    assert metrics["metadata"]["image_ids"] == [0, 1, 2]
    winner = [status for status, _, _ in outcomes].index(0) + 42
    assert metrics["metadata"]["seed"] == winner


def test_processes_of_one_identity_share_the_images(start, tmp_path):
    outcomes = finish(*(start() for _ in range(3)))
    assert [status for status, _, _ in outcomes] == [0, 0, 0], outcomes
    metrics = metrics_schema.load(start.folder / "metrics.json")
    assert metrics["metadata"]["image_ids"] == [0, 1, 2]
    done = [sum(err.count(f"{name}: 100%") > 0 for _, _, err in outcomes) for name in "012"]
    assert done == [1, 1, 1]
    assert not list((start.folder / "records").glob("*.claim"))
    alone = finish(start("name=alone"))
    assert alone[0][0] == 0 and comparable(start.folder)[1:] == comparable(tmp_path / "alone")[1:]
    for number in range(3):
        ours, theirs = (np.load(f / "floats" / f"0000{number}.npz") for f in (start.folder, tmp_path / "alone"))
        assert np.array_equal(ours["estimates"], theirs["estimates"])


def test_a_killed_process_leaves_its_image_to_the_next(start):
    first = start()
    claim = start.folder / "records" / "00000.claim"
    deadline = time.monotonic() + 120
    while not claim.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert claim.exists()
    ((status, out, _),) = finish(start())
    assert status == 0 and "left to" not in out
    assert metrics_schema.load(start.folder / "metrics.json")["metadata"]["image_ids"] == [0, 1, 2]
    assert not claim.exists()


def test_an_image_that_another_machine_works_on_is_left_to_it(tiny_run, sampled):
    assert tiny_run("data.end_id=1").status == 0
    claim = tiny_run.folder / "records" / "00001.claim"
    claim.write_text(json.dumps(vars(this_process()) | {"host": "node7", "pid": 12}))
    outcome = tiny_run()
    assert outcome.status == 0 and sampled == [0, 2]
    assert "1: left to process 12 on node7, which works on it" in outcome.out
    os.utime(claim, (1, 1))  # not renewed since
    assert tiny_run().status == 0 and sampled == [0, 2, 1]


@pytest.mark.parametrize("place", ["floats", "samples/00000_selected.png", "records/00000.json"])
def test_links_in_the_folder_are_refused(tiny_run, tmp_path, sampled, place):
    assert tiny_run("data.end_id=1").status == 0
    precious = tmp_path / "precious"
    target = tiny_run.folder / place
    if target.is_dir():
        target.rename(precious)
    else:
        precious.write_text("mine")
        target.unlink()
    target.symlink_to(precious)
    outcome = tiny_run()
    assert outcome.status == 2 and f"{target} is a link" in outcome.err and sampled == [0]
    assert precious.is_dir() or precious.read_text() == "mine"


def test_a_folder_of_results_may_be_a_link(tiny_run, tmp_path):
    (tmp_path / "scratch").mkdir()
    tiny_run.save_dir.symlink_to(tmp_path / "scratch")
    assert tiny_run("data.end_id=1").status == 0
    assert (tmp_path / "scratch" / "tiny" / "metrics.json").exists()
