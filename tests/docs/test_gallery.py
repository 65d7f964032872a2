"""The programs of docs/gallery/, at tiny sizes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import reconstruct

GALLERY = Path(__file__).resolve().parents[2] / "docs" / "gallery"


@pytest.fixture
def program(request, tmp_path):
    """``program(levels, steps)`` runs one and returns what it returns and its picture."""
    spec = importlib.util.spec_from_file_location(request.param, GALLERY / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(levels, steps):
        returned = module.main(levels, steps, out=str(tmp_path / "out.png"))
        with Image.open(tmp_path / "out.png") as picture:
            return returned, picture.size

    run.module = module
    return run


def only(name):
    return pytest.mark.parametrize("program", [name], indirect=True)


def test_there_are_no_others():
    names = {path.stem for path in GALLERY.glob("*.py")}
    assert names == {"reconstruct", "own_prior", "own_operator", "own_hook"}
    assert names == {path.stem for path in GALLERY.glob("*.png")}


@only("reconstruct")
def test_the_loop_alone_finds_what_the_application_finds(program, tmp_path):
    losses, size = program(2, 2)
    small = ("sampler.annealing.num_steps=2", "sampler.mcmc.num_steps=2", "device=cpu", "save_trajectory=false")
    reconstruct("data.start_id=1", "data.end_id=2", f"save_dir={tmp_path}", "name=same", *small)
    metrics = json.loads((tmp_path / "same" / "metrics.json").read_text())
    assert losses.tolist() == sorted(metrics["measurement"]["per_image"][0]["loss"])
    assert size == (5 * 66 + 2, 68)


@only("own_prior")
def test_a_prior_of_ones_own(program):
    psnr_db, size = program(15, 20)
    assert psnr_db > 18 and size == (5 * 66 + 2, 68)  # grey where nothing is seen: 12.7 dB


@only("own_operator")
def test_an_operator_of_ones_own(program):
    misfit, size = program(4, 4)
    assert 0.9 < misfit < 20 and size == (6 * 66 + 2, 68)


@only("own_operator")
def test_its_adjoint(program):
    operator = program.module.UpperRows(keep_rows=5)
    x, y = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.randn(2, 3, 5, 8, dtype=torch.float64)
    torch.testing.assert_close((operator(x) * y).sum(), (x * operator.adjoint(y, (3, 8, 8))).sum())


@only("own_hook")
def test_a_hook_of_ones_own(program):
    rows, size = program(3, 2)
    assert [row["sigma"] for row in rows] == sorted((row["sigma"] for row in rows), reverse=True)
    assert len(rows) == 3 and all(row["fitted"] > 0 for row in rows) and size == (550, 330)
