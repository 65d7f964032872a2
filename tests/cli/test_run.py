import os
import shutil
import subprocess
import sys
from pathlib import Path

import metrics_schema
import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from PIL import Image
from tiny import QUICK, write_images

from particledaps.settings.command_line import compose_config
from particledaps.settings.family import followed_config
from run_settings import follow_family

ROOT = Path(__file__).resolve().parents[2]


def comparable(folder):
    """The file without time stamps, timings and memory (and whether figures were drawn)."""
    metrics = metrics_schema.load(folder / "metrics.json")
    del metrics["metadata"]["timestamp"], metrics["metadata"]["gpu"], metrics["vram"]
    del metrics["metadata"]["hyperparameters"]["save_trajectory"]
    timing = metrics.pop("timing")
    return metrics, {name: phase["steps"] for name, phase in timing["phases"].items()}


def estimates(folder, image_id=0):
    with np.load(folder / "floats" / f"{image_id:05d}.npz") as arrays:
        return arrays["estimates"]


def test_a_run_leaves_a_complete_folder(baseline):
    outcome, folder = baseline
    assert outcome.status == 0
    metrics = metrics_schema.load(folder / "metrics.json")
    assert metrics["metadata"]["image_ids"] == [0, 1, 2]
    assert metrics["metadata"]["num_samples_final"] == 4
    assert metrics["timing"]["phases"]["sampling"]["steps"] == 9
    assert len(metrics["timing"]["per_step_seconds"]) == 3
    assert {r["state"] for r in metrics["status"]["per_image"]} == {"ok"}
    for image_id in range(3):
        stem = f"{image_id:05d}"
        for name in [f"{stem}_particle{p}.png" for p in range(4)] + [f"{stem}_selected.png"]:
            with Image.open(folder / "samples" / name) as picture:
                assert picture.size == (16, 16)
        assert Image.open(folder / "sheets" / f"{stem}.png").width > 500
        assert Image.open(folder / "trajectory" / f"{stem}.png").height > 500
        with np.load(folder / "floats" / f"{stem}.npz") as arrays:
            assert arrays["y"].shape == (1, 3, 24, 24)
            assert arrays["estimates"].shape == (4, 3, 16, 16)
            assert arrays["truth"].shape == (1, 3, 16, 16)
            assert arrays["image_ids"].tolist() == [image_id]
            assert arrays["particle_ids"].tolist() == [0, 1, 2, 3]


def test_the_table_holds_the_numbers_of_the_file(baseline):
    outcome, folder = baseline
    metrics = metrics_schema.load(folder / "metrics.json")
    rows = {line.split()[0]: line.split() for line in outcome.out.splitlines() if line.strip()}
    for position, row in enumerate(metrics["psnr"]["per_image"]):
        assert rows[str(position)][1] == f"{row['best']:.2f}"
        assert rows[str(position)][3] == f"{row['selected']:.2f}"
    assert rows["mean"][4] == f"{metrics['psnr_aligned']['overall']['best_mean']:.2f}"
    assert str(folder) in outcome.out


def test_config_yaml_is_the_merged_configuration(baseline, arguments):
    _, folder = baseline
    written = yaml.safe_load((folder / "config.yaml").read_text())
    merged = compose_config("config", [*arguments, f"save_dir={folder.parent}", "num_samples=4"])
    own = follow_family(OmegaConf.to_object(merged))  # what the prior's family filled in is written out
    assert written == followed_config(OmegaConf.to_container(merged, resolve=True), own.model, own.sampler)
    assert written["sampler"]["mcmc"]["num_steps"] == 2
    assert written["data"]["kind"] == "folder"


def test_pictures_show_the_floats(baseline):
    _, folder = baseline
    expected = np.round((estimates(folder, 1)[2] / 2 + 0.5) * 255).transpose(1, 2, 0)
    picture = np.asarray(Image.open(folder / "samples" / "00001_particle2.png"), dtype=float)
    assert np.abs(picture - expected).max() <= 1


def test_same_seed_same_file(baseline, tiny_run):
    tiny_run()
    assert comparable(tiny_run.folder) == comparable(baseline[1])


def test_another_seed_another_file(baseline, tiny_run):
    tiny_run("seed=43", "data.end_id=1")
    assert not np.array_equal(estimates(tiny_run.folder), estimates(baseline[1]))
    with np.load(tiny_run.folder / "floats/00000.npz") as ours, np.load(baseline[1] / "floats/00000.npz") as theirs:
        assert np.array_equal(ours["truth"], theirs["truth"])
        assert not np.array_equal(ours["y"], theirs["y"])


def test_equal_images_get_noise_of_their_own(tiny_run, tmp_path):
    write_images(tmp_path / "twins", 1)
    shutil.copy(tmp_path / "twins" / "0.png", tmp_path / "twins" / "1.png")
    tiny_run(f"data.dir={tmp_path}/twins", "num_samples=1")
    first, second = (np.load(tiny_run.folder / "floats" / f"{i:05d}.npz") for i in (0, 1))
    assert np.array_equal(first["truth"], second["truth"])
    assert not np.array_equal(first["y"], second["y"])
    np.savez(tmp_path / "y.npz", y=np.concatenate([first["y"]] * 2), image_ids=np.array([0, 5]))
    tiny_run(f"data.measurement={tmp_path}/y.npz", "num_samples=1", "name=measured")
    again = [estimates(tiny_run.folder.parent / "measured", i) for i in (0, 5)]
    assert np.array_equal(again[0], first["estimates"])
    assert not np.allclose(*again, atol=1e-2)


def test_images_one_by_one_are_the_batch_of_images(baseline, tiny_run):
    for image_id in (2, 0, 1):
        outcome = tiny_run(f"data.start_id={image_id}", f"data.end_id={image_id + 1}")
        assert outcome.status == 0
    assert comparable(tiny_run.folder) == comparable(baseline[1])


def test_one_particle_alone_is_its_row_of_the_batch(baseline, tiny_run):
    tiny_run("particle_ids=[3]", "data.end_id=1")
    assert np.allclose(estimates(tiny_run.folder)[0], estimates(baseline[1])[3], atol=1e-4)
    assert not np.allclose(estimates(tiny_run.folder)[0], estimates(baseline[1])[2], atol=1e-2)
    alone, batch = (metrics_schema.load(f / "metrics.json") for f in (tiny_run.folder, baseline[1]))
    assert alone["psnr"]["per_image"][0]["particle_ids"] == [3]
    assert (tiny_run.folder / "samples" / "00000_particle3.png").exists()
    for key in ("psnr", "ssim", "psnr_aligned"):
        assert alone[key]["per_image"][0]["samples"][0] == pytest.approx(batch[key]["per_image"][0]["samples"][3], 1e-4)
    loss = batch["measurement"]["per_image"][0]["loss"][3]
    assert alone["measurement"]["per_image"][0]["loss"] == pytest.approx([loss], rel=1e-4)


def test_a_given_measurement_is_reconstructed_as_the_simulated_one(baseline, tiny_run):
    outcome = tiny_run(f"data.measurement={baseline[1]}/floats/00001.npz", "data.dir=null", "data=demo")
    assert outcome.status == 0
    metrics = metrics_schema.load(tiny_run.folder / "metrics.json")
    assert metrics["metadata"]["image_ids"] == [1]
    for key in ("psnr", "ssim", "lpips", "psnr_aligned", "ssim_aligned", "lpips_aligned", "modes"):
        assert metrics[key] is None
    assert np.array_equal(estimates(tiny_run.folder, 1), estimates(baseline[1], 1))
    theirs = metrics_schema.load(baseline[1] / "metrics.json")["measurement"]["per_image"][1]
    assert metrics["measurement"]["per_image"] == [theirs]
    with np.load(tiny_run.folder / "floats" / "00001.npz") as arrays:
        assert "truth" not in arrays.files


def test_ids_choose_among_given_measurements(baseline, tiny_run, tmp_path):
    ys = [np.load(baseline[1] / "floats" / f"{i:05d}.npz")["y"] for i in (0, 1)]
    np.savez(tmp_path / "both.npz", y=np.concatenate(ys), image_ids=np.array([5, 9]))
    tiny_run(f"data.measurement={tmp_path}/both.npz", "data.start_id=6")
    assert metrics_schema.load(tiny_run.folder / "metrics.json")["metadata"]["image_ids"] == [9]


VARIANTS = {
    "mh": ["sampler.mcmc.kernel=mh"],
    "langevin": ["sampler.mcmc.kernel=langevin", "sampler.mcmc.curvature_limit=0.5"],
    "exact": ["sampler.mcmc.prior=exact"],
    "cg": ["sampler.mcmc.kernel=cg", "sampler.mcmc.space=pixel", "task=gaussian_blur"],
    "admm": ["sampler.mcmc.kernel=admm", "sampler.mcmc.space=pixel", "sampler.mcmc.covariance=measured"],
    "pixel": ["sampler.mcmc.space=pixel"],
    "measured": ["sampler.mcmc.covariance=measured"],
    "pixel, measured, mh": ["sampler.mcmc.space=pixel", "sampler.mcmc.covariance=measured", "sampler.mcmc.kernel=mh"],
    "daps": ["compat=daps", "sampler.mcmc.tau=0.1"],
    "heun": ["sampler.ode.solver=heun", "sampler.annealing.schedule=ve"],
    "bfloat16": ["precision=bfloat16"],
    "float16": ["precision=float16"],
    "family": ["sampler=latent_daps", "model.family=ldm", "sampler.mcmc.step_size=null", "sampler.mcmc.tau=null"],
    "one_level": ["sampler.annealing.num_steps=1", "num_samples=1"],
}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_every_kind_of_sampler_runs_and_answers_differently(overrides, baseline, tiny_run):
    outcome = tiny_run(*overrides, "data.end_id=1")
    assert outcome.status == 0, outcome.err
    metrics_schema.load(tiny_run.folder / "metrics.json")
    ours, theirs = estimates(tiny_run.folder), estimates(baseline[1])
    assert np.isfinite(ours).all()
    assert not np.array_equal(ours[0], theirs[0])


def test_mixed_files_of_one_folder_get_the_prior_size(tiny_run, tmp_path):
    write_images(tmp_path / "mixed", 1, size=(40, 20))
    Image.new("L", (16, 33), 90).save(tmp_path / "mixed" / "1.png")
    outcome = tiny_run(f"data.dir={tmp_path}/mixed", "num_samples=1")
    assert outcome.status == 0
    with np.load(tiny_run.folder / "floats" / "00001.npz") as arrays:
        assert arrays["truth"].shape == (1, 3, 16, 16)
        assert np.allclose(arrays["truth"], 90 / 127.5 - 1)


def test_pictures_of_one_particle_and_one_level(drawn_run):
    few = ("sampler.annealing.num_steps=1", "num_samples=1", "data.end_id=1", "save_trajectory=true")
    assert drawn_run(*few).status == 0
    assert Image.open(drawn_run.folder / "sheets" / "00000.png").width > 300
    assert Image.open(drawn_run.folder / "trajectory" / "00000.png").height > 300


def test_the_program_itself_runs_from_any_folder(tiny_prior, tmp_path):
    arguments = ["model=embedded", f"model.path={tiny_prior}", "data.end_id=1", "num_samples=2", *QUICK]
    process = subprocess.run(
        [sys.executable, ROOT / "posterior_sample.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr
    assert "chelsea" in process.stdout
    metrics_schema.load(tmp_path / "results" / "demo" / "metrics.json")
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


def test_noise_that_differs_from_the_configuration_is_told(baseline, drawn_run):
    measured = f"data.measurement={baseline[1]}/floats/00001.npz"
    honest = drawn_run.command(measured, "data.dir=null", "data=demo")
    wrong = drawn_run.command(measured, "data.dir=null", "data=demo", "task.noise_sigma=0.1", "name=other")
    assert "noise looks like" not in honest.out
    assert "noise looks like 0.05" in wrong.out or "noise looks like 0.04" in wrong.out
