import json
import os
import subprocess
import sys
from pathlib import Path

import metrics_schema
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import command, reconstruct, write_images
from training_support import TINY

from particledaps.priors.embedded import load_embedded, read_config
from particledaps.training.loop import TrainingLoop

ROOT = Path(__file__).resolve().parents[2]


def test_folder_to_prior_to_reconstruction(tmp_path):
    write_images(tmp_path / "pictures", 12)
    train = [f"images={tmp_path}/pictures", f"save_dir={tmp_path}/trainings", f"export_dir={tmp_path}/exported", *TINY]
    facts = ["name=mine", "source=drawn by chance", "licence=CC0"]
    assert command("train_prior", *train, *facts, "stages=[autoencoder]").status == 0
    assert not (tmp_path / "exported").exists()
    outcome = command("train_prior", *train, *facts)
    assert outcome.status == 0, outcome.err
    assert '"autoencoder_psnr_db"' in outcome.out
    assert sorted(p.name for p in (tmp_path / "trainings" / "mine").iterdir()) == ["autoencoder", "denoiser"]
    assert all((tmp_path / "trainings" / "mine" / s / "curve.png").exists() for s in ("autoencoder", "denoiser"))

    card = read_config(tmp_path / "exported")
    json.dumps(card, allow_nan=False)
    assert (card["name"], card["source"], card["licence"]) == ("mine", "drawn by chance", "CC0")
    assert card["training"]["denoiser"]["steps"] == 4
    assert card["figures"]["validation"]["num_images"] == 2
    assert Image.open(tmp_path / "exported" / "samples.png").width > 500
    prior = load_embedded(tmp_path / "exported")
    assert prior.misfit_excess["phase_retrieval"][0] == pytest.approx(card["misfit_excess"]["phase_retrieval"][0])
    ema = torch.load(tmp_path / "trainings" / "mine" / "denoiser" / "checkpoint.pt", weights_only=True)["ema"]
    shipped = load_file(tmp_path / "exported" / "denoiser.safetensors")
    assert all(torch.equal(shipped[k.removeprefix("unet.")], v.half()) for k, v in ema.items())

    outcome = reconstruct(
        "model=embedded",
        f"model.path={tmp_path}/exported",
        "data=folder",
        f"data.dir={tmp_path}/pictures",
        "data.end_id=1",
        "num_samples=2",
        "sampler.annealing.num_steps=2",
        "sampler.mcmc.num_steps=2",
        "device=cpu",
        "save_trajectory=false",
        f"save_dir={tmp_path}/results",
    )
    assert outcome.status == 0, outcome.err
    metrics_schema.load(tmp_path / "results" / "demo" / "metrics.json")


def test_interrupt_in_a_training(tmp_path, monkeypatch):
    def interrupt(self, loss):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainingLoop, "_update", interrupt)
    write_images(tmp_path / "pictures", 12)
    outcome = command("train_prior", f"images={tmp_path}/pictures", f"save_dir={tmp_path}/trainings", *TINY)
    assert outcome.status == 130
    assert "train_prior.py: interrupted" in outcome.err and "Traceback" not in outcome.err


REFUSED = {
    "no images": ([], "images is not set"),
    "absent": (["images=/not/there"], "/not/there does not exist"),
    "unknown key": (["images=x", "imges=x"], "imges: unknown key; did you mean images"),
    "wrong type": (["images=x", "resolution=big"], "resolution=big"),
    "unknown stage": (["images=x", "stages=[decoder]"], "stages=decoder: allowed are autoencoder, denoiser, export"),
    "device": (["images=x", "device=abacus"], "device=abacus: allowed are auto, cpu, cuda"),
    "name": (["images=x", "name=../x"], "name='../x'"),
    "resolution": (["images=x", "resolution=20"], "resolution=20: must be a multiple of 16"),
    "zoom": (["images=x", "zoom=1.5"], "zoom=1.5: must be at least 0 and at most 1"),
    "zoom and close-ups": (["images=x", "zoom=0.7", "close_up=0.5"], "their sum must be at most 1"),
    "steps": (["images=x", "denoiser.loop.num_steps=0"], "denoiser.loop.num_steps=0: must be at least 1"),
}


@pytest.mark.parametrize(("arguments", "fragment"), REFUSED.values(), ids=REFUSED)
def test_bad_input(tmp_path, arguments, fragment):
    outcome = command("train_prior", *arguments, f"save_dir={tmp_path}/trainings", f"export_dir={tmp_path}/exported")
    assert outcome.status == 2
    assert outcome.err.startswith("train_prior.py: ") and "Traceback" not in outcome.err
    assert fragment in outcome.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_absent_cuda(tmp_path):
    outcome = command("train_prior", "images=x", "device=cuda", f"save_dir={tmp_path}/trainings")
    assert outcome.status == 2 and "no CUDA device" in outcome.err


def test_a_stage_needs_the_one_before(tmp_path):
    write_images(tmp_path / "pictures", 12)
    save_dir = f"save_dir={tmp_path}/trainings"
    outcome = command("train_prior", f"images={tmp_path}/pictures", save_dir, "stages=[denoiser]", *TINY)
    assert outcome.status == 2
    assert "checkpoint.pt does not exist: run that stage first" in outcome.err


def test_the_program_itself(tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "train_prior.py", "images=/not/there"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert (process.returncode, process.stderr) == (2, "train_prior.py: /not/there does not exist\n")
    assert list(tmp_path.iterdir()) == []
