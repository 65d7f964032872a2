"""Hooks of the user's own, named on the command line."""

import sys

import metrics_schema
import numpy as np
import pytest

HOOK = """
import torch
from sampler import Hook

class Count(Hook):
    def __init__(self, start=0):
        self.start, self.levels = start, start
    def fresh(self):
        return Count(self.start)
    def after_mcmc(self, state, info):
        self.levels += 1
        info.add("levels", count=self.levels, mean=state.z0_y.mean(), ids=state.particle_id)
        return state

class Shift(Hook):
    def __init__(self, setup, by=0.1):
        self.by, self.levels = by, setup.num_levels
    def at_end(self, state, info):
        import dataclasses
        info.add("end", levels=self.levels)
        return dataclasses.replace(state, z0_y=state.z0_y + self.by)

class Silent(Hook):
    def after_mcmc(self, state, info):
        pass

class Broken(Hook):
    def before_ode(self, state, info):
        return state + 1

class Odd(Hook):
    def at_end(self, state, info):
        info.add("odd", value=object())
        return state

class NoHook:
    pass
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "lab_hooks.py").write_text(HOOK)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield
    sys.modules.pop("lab_hooks", None)


def floats(folder, name):
    with np.load(folder / name / "floats" / "00000.npz") as arrays:
        return arrays["estimates"]


def test_a_hook_that_only_looks_changes_no_number(tiny_run):
    assert tiny_run("name=plain").status == 0
    outcome = tiny_run("name=looked", "hooks=[lab_hooks:Count]")
    assert outcome.status == 0, outcome.err
    assert np.array_equal(floats(tiny_run.save_dir, "plain"), floats(tiny_run.save_dir, "looked"))
    images = metrics_schema.load(tiny_run.save_dir / "looked" / "metrics.json")["hooks"]["Count"]["per_image"]
    for image in images:  # each begins with a fresh one
        assert [row["count"] for row in image["levels"]] == list(range(1, len(image["levels"]) + 1))
        assert isinstance(image["levels"][0]["mean"], float) and isinstance(image["levels"][0]["ids"], list)
    assert [image["image_id"] for image in images] == [0, 1, 2]


def test_a_hook_gets_its_options_and_the_run(tiny_run):
    plain, moved = (
        tiny_run("name=plain"),
        tiny_run("name=moved", "hooks=[{target: lab_hooks:Shift, options: {by: 0.3}}]"),
    )
    assert plain.status == 0 == moved.status, moved.err
    assert not np.array_equal(floats(tiny_run.save_dir, "plain"), floats(tiny_run.save_dir, "moved"))
    metrics = metrics_schema.load(tiny_run.save_dir / "moved" / "metrics.json")
    levels = metrics["metadata"]["hyperparameters"]["sampler"]["annealing"]["num_steps"]
    assert metrics["hooks"]["Shift"]["per_image"][0]["end"] == [{"levels": levels}]


def test_a_hook_is_part_of_the_identity(tiny_run):
    assert tiny_run().status == 0
    outcome = tiny_run("hooks=[lab_hooks:Count]")
    assert outcome.status == 2 and "hooks" in outcome.err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("[absent_hooks:Count]", "hooks=absent_hooks:Count: cannot be imported"),
        ("[lab_hooks:Absent]", "hooks=lab_hooks:Absent: cannot be imported"),
        ("[lab_hooks]", "hooks: lab_hooks names no hook; write package.module:Name"),
        ("[3]", "hooks: 3 names no hook"),
        ("[lab_hooks:NoHook]", "returned NoHook, not a particledaps.particles.state.Hook"),
        ("[lab_hooks:Count,lab_hooks:Count]", "two of them are called Count"),
        ("[{target: lab_hooks:Count, option: {}}]", "unknown entry option"),
        ("[{target: lab_hooks:Count, options: 3}]", "no mapping"),
        ("[{target: lab_hooks:Count, options: {pace: 2}}]", "cannot be called with pace"),
        ("[lab_hooks:Silent]", "hooks=lab_hooks:Silent: after_mcmc returned NoneType; a hook returns the state"),
        ("[lab_hooks:Broken]", "hooks=lab_hooks:Broken: before_ode: TypeError"),
        ("[lab_hooks:Odd]", "a row of the log holds a object"),
    ],
)
def test_what_is_no_hook_is_told_in_a_sentence(tiny_run, given, words):
    outcome = tiny_run(f"hooks={given}")
    assert outcome.status == 2 and words in outcome.err and "Traceback" not in outcome.err
