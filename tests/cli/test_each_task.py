"""Every task through the command line: images in, measurements without truth in, refusals; custom operators."""

import re
import sys
from pathlib import Path

import metrics_schema
import numpy as np
import pytest
import torch

from particledaps.operators.blur_network import BlurNetwork
from particledaps.settings.tasks import OPERATORS

CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
QUALITY = (*metrics_schema.METRICS, "modes")
CHEAP = ("data.end_id=2", "num_samples=2")


@pytest.fixture(scope="session")
def blur_weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "blur.pth"
    torch.manual_seed(0)
    torch.save(BlurNetwork(1, 1, 1, 1).state_dict(), path)
    return path


def task(kind, blur_weights):
    return (f"task={kind}", *((f"task.options.weights={blur_weights}",) if kind == "nonlinear_blur" else ()))


def floats(folder, image_id):
    with np.load(folder / "floats" / f"{image_id:05d}.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("kind", [k for k in OPERATORS if k != "phase_retrieval"])
def test_a_task_runs_and_its_measurement_runs_without_images(kind, tiny_run, blur_weights):
    arguments = (*task(kind, blur_weights), *CHEAP)
    outcome = tiny_run(*arguments)
    assert outcome.status == 0, outcome.err
    metrics = metrics_schema.load(tiny_run.folder / "metrics.json")
    conventions, rows = metrics["metadata"]["conventions"], metrics["measurement"]["per_image"]
    assert conventions["noise_sigma"] == 0.05 and conventions["oversample"] is None
    assert "[-1, 1]" in conventions["measurement_range"]
    assert all(r["symmetry"] == "identity" for r in metrics["selection"]["per_image"])
    assert metrics["psnr"]["per_image"][0]["samples"] == metrics["psnr_aligned"]["per_image"][0]["samples"]
    assert all(row["pseudo_inverse_psnr_db"] > 3 for row in rows)
    first = floats(tiny_run.folder, 1)
    given = tiny_run(*arguments, f"data.measurement={tiny_run.folder}/floats/00001.npz", "data.dir=null", "name=given")
    assert given.status == 0, given.err
    alone = metrics_schema.load(tiny_run.save_dir / "given" / "metrics.json")
    assert all(alone[key] is None for key in QUALITY)
    again, before = alone["measurement"]["per_image"][0], rows[1]
    assert again.pop("fingerprint") == pytest.approx(before.pop("fingerprint"))
    assert again == before | {"pseudo_inverse_psnr_db": None}
    assert np.array_equal(floats(tiny_run.save_dir / "given", 1)["estimates"], first["estimates"])


def test_masks_differ_between_images_unless_they_are_shared(tiny_run):
    for name, flag in (("own", "true"), ("shared", "false")):
        tiny_run("task=inpainting_rand", f"task.options.per_image={flag}", *CHEAP, f"name={name}")
        masks = [floats(tiny_run.save_dir / name, i)["mask"] for i in (0, 1)]
        assert masks[0].shape == (1, 16, 16)
        assert np.array_equal(*masks) == (name == "shared")


def test_a_measurement_keeps_its_mask_whatever_the_seed(tiny_run):
    tiny_run("task=inpainting_rand", *CHEAP)
    file = tiny_run.folder / "floats" / "00001.npz"
    tiny_run("task=inpainting_rand", *CHEAP, f"data.measurement={file}", "data.dir=null", "seed=7", "name=given")
    assert np.array_equal(floats(tiny_run.folder, 1)["mask"], floats(tiny_run.save_dir / "given", 1)["mask"])


def test_a_mask_without_a_file_to_hold_it_is_asked_for(tiny_run, tmp_path):
    np.savez(tmp_path / "y.npz", y=np.zeros((1, 3, 16, 16), np.float32))
    outcome = tiny_run("task=inpainting", f"data.measurement={tmp_path}/y.npz")
    assert outcome.status == 2 and "has no array 'mask'" in outcome.err


REFUSED = {
    "value": (["task=hdr", "task.options.scale=1"], "task.options.scale=1: must be greater than 1"),
    "type": (
        ["task=down_sampling", "task.options.scale_factor=big"],
        "task.options.scale_factor=big: must be a whole number",
    ),
    "unknown": (["task=hdr", "+task.options.gain=2"], "task.options.gain: unknown key; hdr takes scale"),
    "image side": (
        ["task=down_sampling", "task.options.scale_factor=32"],
        "scale_factor=32: exceeds the image side 16",
    ),
    "box": (["task=inpainting", "task.options.margin=100"], "max_side=128: a box of 8 px with margins of 6 px"),
    "weights": (["task=nonlinear_blur"], "GOPRO_wVAE.pth: no such file; nonlinear blur needs"),
}


def test_measurements_that_the_operator_cannot_make_are_refused(tiny_run, tmp_path):
    np.savez(tmp_path / "y.npz", y=np.zeros((1, 3, 16, 16), np.float32))
    outcome = tiny_run("task=down_sampling", "task.options.scale_factor=32", f"data.measurement={tmp_path}/y.npz")
    assert outcome.status == 2 and "task.options.scale_factor=32: exceeds the image side 16" in outcome.err


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals_are_one_line_and_leave_nothing(tiny_run, overrides, message):
    outcome = tiny_run(*overrides)
    assert outcome.status == 2 and message in outcome.err and outcome.err.count("\n") == 1
    assert not tiny_run.save_dir.exists()


def blocks(heading):
    section = CONTRIBUTING.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```(\w*)\n(.*?)```", section, re.S)


def test_the_operator_of_contributing_works_when_copied(tiny_run, tmp_path, monkeypatch):
    (_, code), (_, command) = blocks("Add an operator")[:2]
    assert 10 <= len(code.strip().splitlines()) <= 21
    name = re.match(r"# (\w+)\.py", code)[1]
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    words = command.split()
    assert words[:2] == ["python", "posterior_sample.py"] and f"task.target={name}:" in command
    outcome = tiny_run(*CHEAP, *words[2:], "+task.options.keep_rows=10")
    sys.modules.pop(name)
    assert outcome.status == 0, outcome.err
    run = tiny_run.save_dir / words[-1].removeprefix("name=")
    assert floats(run, 0)["y"].shape == (1, 3, 10, 16)
    assert metrics_schema.load(run / "metrics.json")["psnr"] is not None


PHYSICS = """
import torch
from types import SimpleNamespace

class Mean(torch.nn.Module):
    noise_model = SimpleNamespace(sigma=0.1)
    def A(self, x):
        return x.mean(1, keepdim=True)
    def A_adjoint(self, y):
        return y.expand(-1, 3, -1, -1) / 3

def build():
    return Mean()
"""


def test_physics_of_deepinv_by_its_adapter(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "lab_physics.py").write_text(PHYSICS)
    monkeypatch.syspath_prepend(tmp_path)
    adapter = ("task=custom", "task.target=particledaps.operators.deepinv_adapter:from_physics", *CHEAP)
    outcome = tiny_run(*adapter, "+task.options.physics=lab_physics:build")
    assert outcome.status == 0, outcome.err
    metrics = metrics_schema.load(tiny_run.folder / "metrics.json")
    assert metrics["measurement"]["per_image"][0]["noise_floor"] == pytest.approx(256 * 0.01)
    wrong = tiny_run(*adapter, "+task.options.physics=lab_physics:missing", "name=wrong")
    sys.modules.pop("lab_physics")
    assert wrong.status == 2 and "from_physics: physics=lab_physics:missing: cannot be imported" in wrong.err
