"""The examples of CONTRIBUTING.md work as they are printed."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import metrics_schema
import pytest
import torch
from tiny import reconstruct

from particledaps.settings.fingerprint import identity

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()
FEW = ("sampler.annealing.num_steps=2", "sampler.mcmc.num_steps=2", "num_samples=2", "data.end_id=1", "device=cpu")


def section(heading):
    """The first Python block of a section and the command below it."""
    part = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    code, command = re.search(r"```python\n(.*?)```\n```\n(.*?)```", part, re.DOTALL).groups()
    return code, shlex.split(command.replace("\n", " "))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in ("my_prior", "my_hook"):
        sys.modules.pop(name, None)


def test_the_custom_prior_in_30_lines(workplace):
    code, command = section("Add a prior")
    assert len(code.splitlines()) <= 30
    (workplace / "my_prior.py").write_text(code)
    torch.save(importlib.import_module("my_prior").Network(16).state_dict(), workplace / "net.pt")
    assert command[:2] == ["python", "posterior_sample.py"]
    outcome = reconstruct(*command[2:], *FEW, f"save_dir={workplace}/results", "save_trajectory=false")
    assert outcome.status == 0, outcome.err
    metrics = metrics_schema.load(workplace / "results" / "mine" / "metrics.json")
    hyperparameters = metrics["metadata"]["hyperparameters"]
    assert hyperparameters["sampler"]["annealing"]["sigma_max"] == 100  # the annealing of pixel priors
    assert [row["state"] for row in metrics["status"]["per_image"]] == ["ok"]


def test_a_key_that_is_added_shuts_out_no_stored_run():
    part = TEXT.split("## Add a key\n")[1].split("\n## ")[0]
    names = {}
    exec(compile(re.search(r"```python\n(.*?)```", part, re.DOTALL)[1], "CONTRIBUTING.md", "exec"), names)
    keys = names["MoreKeys"]
    assert identity({}, keys) == identity({"patience": 0, "report": False}, keys) == {}
    assert identity({"patience": 5}, keys) == {"patience": 5}


def test_the_hook_of_ones_own(workplace):
    code, command = section("Add a hook")
    (workplace / "my_hook.py").write_text(code)
    outcome = reconstruct(*command[2:], *FEW, f"save_dir={workplace}/results", "save_trajectory=false")
    assert outcome.status == 0, outcome.err
    metrics = metrics_schema.load(workplace / "results" / "spread" / "metrics.json")
    (image,) = metrics["hooks"]["LogSpread"]["per_image"]
    assert [row["step"] for row in image["spread"]] == [0] and image["spread"][0]["std"] > 0
