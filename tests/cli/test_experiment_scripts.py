"""commands_gpu/*.sh: usage, flags and pass-through, with a stand-in for Python that prints what it was asked."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = {
    "exp0_baseline": ["--1", "--10", "--90"],
    "exp1_repulsion": ["--1", "--10", "--90"],
    "exp2_pruning": ["--1", "--10", "--90"],
    "exp3_2particle": ["--10", "--90"],
    "exp4_optimization": ["--1", "--10", "--90"],
    "exp5_final": ["--imagenet", "--ffhq"],
}
IDS = {"--1": (0, 1), "--10": (0, 10), "--90": (10, 100), "--imagenet": (0, 100), "--ffhq": (0, 100)}


@pytest.fixture
def script(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text('#!/bin/sh\necho "CALL $@"\n')
    stand_in.chmod(0o755)

    def call(name, *arguments, python=stand_in):
        command = ["bash", str(ROOT / "commands_gpu" / f"{name}.sh"), *arguments]
        environment = os.environ | {"PYTHON": str(python)}
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    return call


def calls(process):
    return [line.split()[1:] for line in process.stdout.splitlines() if line.startswith("CALL ")]


def test_every_script_and_its_experiment_exist():
    assert {p.stem for p in (ROOT / "commands_gpu").glob("exp*.sh")} == set(SCRIPTS)
    assert all((ROOT / "configs" / "experiment" / f"{name}.yaml").exists() for name in SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_flag_prints_the_usage(script, name):
    process = script(name)
    assert process.returncode == 0 and not calls(process)
    assert process.stdout.startswith(f"usage: bash commands_gpu/{name}.sh")
    assert all(f"  {flag} " in process.stdout for flag in SCRIPTS[name])
    assert script(name, "--", "model=cats64").stdout == process.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_unknown_flag_runs_nothing(script, name):
    for wrong in ("--100", "1", "--1x", "*"):
        process = script(name, SCRIPTS[name][0], wrong)
        assert process.returncode == 2 and not calls(process)
        assert f"unknown flag {wrong}" in process.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_run_in_order_with_names_of_their_own(script, name):
    ran = calls(script(name, *reversed(SCRIPTS[name])))
    assert len(ran) == len(SCRIPTS[name])
    for flag, arguments in zip(SCRIPTS[name], ran, strict=True):
        start, end = IDS[flag]
        assert arguments[:2] == ["posterior_sample.py", f"experiment={name}"]
        assert {f"data.start_id={start}", f"data.end_id={end}", f"name={name}_{flag[2:]}"} <= set(arguments)
    assert len({a for arguments in ran for a in arguments if a.startswith("name=")}) == len(ran)


def test_everything_after_the_dashes_is_passed_on_last(script):
    extra = ["model=cats64", "data=folder", "data.dir=my images", "seed=7"]
    process = script("exp2_pruning", "--10", "--", *extra)
    assert process.stdout.rstrip().endswith("model=cats64 data=folder data.dir=my images seed=7")


def test_ffhq_names_its_own_prior_and_data(script):
    (arguments,) = calls(script("exp5_final", "--ffhq"))
    groups = dict(a.split("=", 1) for a in arguments if "=" in a)  # the last one wins, as in Hydra
    assert (groups["model"], groups["data"]) == ("ffhq256ldm", "test-ffhq")


def test_a_failed_run_stops_the_script(script, tmp_path):
    failing = tmp_path / "failing"
    failing.write_text('#!/bin/sh\necho "CALL $@"\nexit 3\n')
    failing.chmod(0o755)
    process = script("exp1_repulsion", "--1", "--10", python=failing)
    assert process.returncode == 3 and len(calls(process)) == 1
