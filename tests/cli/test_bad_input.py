import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny import command


class RunsCode:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def assert_refused(outcome, *fragments, status=2):
    assert outcome.status == status, outcome
    assert "Traceback" not in outcome.err + outcome.out
    assert outcome.err.startswith("posterior_sample.py: ")
    assert outcome.err.count("\n") <= 1 + outcome.err.count("=")  # a line a problem
    assert len(outcome.err) < 1500, outcome.err  # the names of all top-level keys fit, a trace does not
    for fragment in fragments:
        assert str(fragment) in outcome.err


@pytest.fixture
def refuses(tiny_run):
    """Run with overrides; the run must end in one message with all fragments and leave nothing behind."""

    def check(overrides, *fragments, run=tiny_run):
        assert_refused(run(*overrides), *fragments)
        assert not tiny_run.save_dir.exists()

    return check


COMMAND_LINES = {
    "unknown key": (["num_sampels=2"], "num_sampels", "did you mean num_samples"),
    "unknown nested key": (["sampler.mcmc.num_step=2"], "did you mean", "sampler.mcmc.num_steps"),
    "unknown key, nothing like it": (["qqq=2"], "qqq: unknown key; allowed are", "num_samples"),
    "wrong type": (["num_samples=abc"], "num_samples=abc", "Integer"),
    "fraction for integer": (["seed=1.5"], "seed=1.5", "Integer"),
    "no value for a flag": (["save_trajectory=maybe"], "save_trajectory=maybe", "bool"),
    "no key=value": (["demo"], "'demo' is no override", "key=value"),
    "option without a plus": (["model.options.file=net.pt"], "takes a plus: +model.options.file=net.pt"),
    "broken syntax": (["num_samples=["], "num_samples=["),
    "broken reference": (["name=${nothing}"], "name", "nothing"),
    "missing value": (["data.dir=???"], "data.dir is not set"),
    "model option": (["model=cat"], "model=cat: allowed are cats64, cats64px, custom, diffusers, embedded"),
    "data option": (["data=cat"], "data=cat: allowed are demo, folder, npz"),
    "sampler option": (["sampler=cat"], "sampler=cat: allowed are auto, daps, latent_daps", "pixel_daps"),
    "task option": (["task=cat"], "task=cat: allowed are custom, down_sampling", "phase_retrieval"),
    "compat option": (["compat=cat"], "compat=cat: allowed are daps, none"),
}
VALUES = {
    "no particles": (["num_samples=0"], "num_samples=0", "at least 1"),
    "negative sigma": (["sampler.annealing.sigma_min=-0.1"], "sampler.annealing.sigma_min=-0.1", "greater than 0"),
    "infinite sigma": (["sampler.annealing.sigma_max=inf"], "sampler.annealing.sigma_max=inf", "greater than 0"),
    "no noise": (["task.noise_sigma=little"], "task.noise_sigma=little: must be a number greater than 0, or auto"),
    "whose noise": (["task.noise_sigma=auto"], "task.noise_sigma=auto: is read off a given measurement"),
    "not a number": (["task.noise_sigma=nan"], "task.noise_sigma=nan", "greater than 0"),
    "sigmas swapped": (["sampler.annealing.sigma_max=0.05"], "sigma_max=0.05", "exceed sigma_min=0.1"),
    "ODE ends above": (["sampler.ode.sigma_min=0.5"], "sampler.ode.sigma_min=0.5", "below", "0.1"),
    "id out of range": (["data.end_id=9"], "data.end_id=9", "ids 0 to 2"),
    "start out of range": (["data.start_id=3"], "data.start_id=3", "ids 0 to 2"),
    "negative id": (["data.start_id=-1"], "data.start_id=-1", "at least 0"),
    "empty range": (["data.start_id=2", "data.end_id=2"], "data.end_id=2", "greater than data.start_id=2"),
    "empty name": (["name="], "name=''", "folder name"),
    "blank name": (["name=' '"], "name=' '", "folder name"),
    "name leaves save_dir": (["name=../other"], "name='../other'", "folder name"),
    "name is save_dir": (["name=."], "name='.'", "folder name"),
    "absolute name": (["name=/tmp/other"], "name='/tmp/other'", "folder name"),
    "long name": (["name=" + "a" * 201], "200 characters"),
    "no save_dir": (["save_dir="], "save_dir=''"),
    "unknown device": (["device=tpu"], "device=tpu: allowed are auto, cpu, cuda"),
    "particle ids": (["particle_ids=[4]"], "particle_ids=[4]", "0 to num_samples - 1"),
    "particle ids twice": (["particle_ids=[1,1]"], "particle_ids=[1, 1]", "distinct"),
    "no particle ids": (["particle_ids=[]"], "particle_ids=[]"),
    "pruning out of range": (["pruning_step=1001"], "pruning_step=1001", "at most 1000"),
    "pruning step": (["pruning_step=1001"], "pruning_step=1001: must be at least -1 and at most 1000"),
    "pruning step that no level reaches": (["pruning_step=10"], "pruning_step=10: no level is that late", "t = "),
    "pruning to nothing": (["pruning_keep=0"], "pruning_keep=0: must be at least 1"),
    "pruning to more": (["pruning_step=200", "pruning_keep=5"], "pruning_keep=5", "num_samples=4"),
    "pruning rule": (["pruning_rule=best"], "pruning_rule=best: allowed are loss, diverse"),
    "branching in place": (["pruning_branch=1", "pruning_mode=mask"], "pruning_branch", "pruning_mode=slice"),
    "negative repulsion": (["repulsion_scale=-1"], "repulsion_scale=-1: must be at least 0"),
    "repulsion unit": (["repulsion_unit=db"], "repulsion_unit=db: allowed are ratio, raw"),
    "repulsion features": (["repulsion_features=clip"], "allowed are auto, dino, latent, pixel"),
    "odd latents": (["repulsion_kernel=odd", "repulsion_features=latent"], "repulsion_kernel=odd", "pixel or dino"),
    "optimisation before pruning": (
        ["pruning_step=200", "optimization_step=400"],
        "optimization_step=400: must not exceed pruning_step=200",
    ),
    "half a measurement for a posterior": (
        ["optimization_prior_sigma=0.1", "optimization_accept=split"],
        "optimization_accept=split",
        "use auto",
    ),
    "optimisation rate": (["optimization_lr=0"], "optimization_lr=0: must be greater than 0"),
    "kernel": (["sampler.mcmc.kernel=foo"], "sampler.mcmc.kernel=foo: allowed are langevin, hmc, mh, cg, admm"),
    "mh without potential": (["sampler.mcmc.kernel=mh", "sampler.mcmc.prior=exact"], "kernel=mh", "prior=gaussian"),
    "margin": (["selection_margin=0.5"], "selection_margin=0.5: only selection_rule=fresh2 has one"),
    "space": (["sampler.mcmc.space=fourier"], "sampler.mcmc.space=fourier: allowed are latent, pixel"),
    "covariance": (["sampler.mcmc.covariance=exact"], "sampler.mcmc.covariance=exact: allowed are sigma, measured"),
    "exact in pixels": (["sampler.mcmc.space=pixel", "sampler.mcmc.prior=exact"], "prior=exact", "space=latent only"),
    "exact, measured": (["sampler.mcmc.covariance=measured", "sampler.mcmc.prior=exact"], "covariance=sigma only"),
    "cg in latents": (["sampler.mcmc.kernel=cg", "task=inpainting"], "kernel=cg", "add sampler.mcmc.space=pixel"),
    "admm of pixels": (
        ["sampler.mcmc.kernel=admm", "sampler.mcmc.space=pixel", "task=gaussian_blur"],
        "kernel=admm: splits amplitudes from their phases, and gaussian_blur measures none; use cg",
    ),
    "cg of magnitudes": (
        ["sampler.mcmc.kernel=cg", "sampler.mcmc.space=pixel"],
        "kernel=cg: draws exactly for linear operators, and phase_retrieval is none",
    ),
    "clamp in pixels": (["sampler.mcmc.space=pixel", "compat.gradient_clamp=1"], "compat.gradient_clamp=1", "=null"),
    "momentum": (["sampler.mcmc.momentum=1"], "sampler.mcmc.momentum=1", "0.9999"),
    "unknown family": (["sampler=latent_daps", "model.family=dogs"], "model.family=dogs", "pixel, ldm, cats64"),
    "no target": (["task=custom"], "task.target is not set", "package.module:factory"),
    "target is no module": (["task=custom", "task.target=no.where:f"], "task.target=no.where:f", "cannot be imported"),
    "target is not on the path": (["task=custom", "task.target=nowhere:f"], "nowhere must lie in the checkout or"),
    "noise of a custom task": (
        ["task=custom", "task.target=time:time", "task.noise_sigma=0.2"],
        "task.noise_sigma=0.2: a custom operator has its own",
        "+task.options.noise_sigma=0.2",
    ),
    "target has no factory": (["task=custom", "task.target=json:f"], "task.target=json:f", "cannot be imported"),
    "target without colon": (["task=custom", "task.target=json"], "task.target=json", "package.module:factory"),
    "relative target": (["task=custom", "task.target=.a:f"], "task.target=.a:f", "package.module:factory"),
    "target takes no options": (["task=custom", "task.target=json:loads"], "task.target=json:loads", "called with"),
    "target is no operator": (
        ["task=custom", "task.target=time:time"],
        "returned float, not a particledaps.operators.operator",
    ),
    "no folder": (["data.dir=/not/there"], "data.dir=/not/there is not a folder"),
    "folder not set": (["data.dir=null"], "data.dir is not set"),
    "no npz": (["data=npz", "data.path=/not/there.npz"], "/not/there.npz does not exist"),
    "split": (["data.split=dev"], "data.split=dev: allowed are test, validation, train"),
    "no measurement": (["data.measurement=/not/there.npz"], "/not/there.npz does not exist"),
    "no prior": (["model.path=/not/there"], "no prior in /not/there", "config.json"),
}


@pytest.mark.parametrize(("overrides", "fragments"), [(v[0], v[1:]) for v in COMMAND_LINES.values()], ids=COMMAND_LINES)
def test_command_line(refuses, tiny_run, overrides, fragments):
    refuses(overrides, *fragments, run=lambda o: command("posterior_sample", o, f"save_dir={tiny_run.save_dir}"))


@pytest.mark.parametrize(("overrides", "fragments"), [(v[0], v[1:]) for v in VALUES.values()], ids=VALUES)
def test_value(refuses, overrides, fragments):
    refuses(overrides, *fragments)


def test_all_problems_at_once(refuses, tiny_run):
    keys = ["num_samples=0", "seed=-1", "device=abacus", "task.noise_sigma=0", "sampler.ode.solver=rk4"]
    refuses(keys, *keys, run=tiny_run.command)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_absent_cuda(refuses):
    refuses(["device=cuda"], "device=cuda", "no CUDA device", "device=cpu")


def test_absent_torch_xla(refuses, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    refuses(["use_tpu=true"], "use_tpu=true", "torch_xla", "device=cpu")


def test_help(tiny_run):
    outcome = tiny_run.command("--help")
    assert outcome.status == 0
    assert "num_samples: 4" in outcome.out
    assert not tiny_run.save_dir.exists()


@pytest.fixture
def prior_copy(tiny_prior, tmp_path):
    return shutil.copytree(tiny_prior, tmp_path / "prior")


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def copy_weights(folder):
    shutil.copy(folder / "autoencoder.safetensors", folder / "denoiser.safetensors")


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


PRIORS = {
    "weights missing": (lambda f: (f / "denoiser.safetensors").unlink(), "denoiser.safetensors is missing"),
    "header cut": (lambda f: truncate(f / "autoencoder.safetensors", 100), "autoencoder.safetensors", "truncated"),
    "data cut": (lambda f: truncate(f / "denoiser.safetensors", -10), "denoiser.safetensors", "truncated"),
    "weights empty": (lambda f: truncate(f / "denoiser.safetensors", 0), "denoiser.safetensors", "truncated"),
    "other weights": (copy_weights, "denoiser.safetensors does not fit config.json", "conv_in.weight"),
    "config missing": (lambda f: (f / "config.json").unlink(), "no prior in", "config.json is missing"),
    "config cut": (lambda f: truncate(f / "config.json", 30), "config.json is damaged"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json is damaged"),
    "config is binary": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json is damaged"),
    "config lacks an entry": (lambda f: change_config(f, lambda c: c.pop("latent_std")), "no valid entry latent_std"),
    "wrong type": (lambda f: change_config(f, lambda c: c.update(sigma_data="x")), "no valid entry sigma_data"),
    "no such network": (lambda f: change_config(f, lambda c: c["denoiser"].update(wings=2)), "no UNet2DModel", "wings"),
    "statistics": (lambda f: change_config(f, lambda c: c.update(latent_mean=[0, 0])), "latent_mean", "do not fit"),
    "patch": (lambda f: change_config(f, lambda c: c.update(patch=0)), "patch", "do not fit"),
}


@pytest.mark.parametrize(("damage", "fragments"), [(v[0], v[1:]) for v in PRIORS.values()], ids=PRIORS)
def test_damaged_prior(refuses, prior_copy, damage, fragments):
    damage(prior_copy)
    refuses([f"model.path={prior_copy}"], *fragments)


@pytest.mark.parametrize("write", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))], ids=["torch", "pickle"])
def test_pickled_weights_run_no_code(refuses, prior_copy, tmp_path, write):
    write(RunsCode(tmp_path / "ran"), prior_copy / "denoiser.safetensors")
    refuses([f"model.path={prior_copy}"], "not a readable safetensors file")
    assert not (tmp_path / "ran").exists()


def test_custom_prior_that_is_none(refuses, faulty_prior):
    overrides = ["model=custom", "model.target=faulty_prior:not_a_prior"]
    refuses(overrides, "faulty_prior:not_a_prior returned int, not a particledaps.priors.prior.Prior")
    refuses([*overrides, "+model.options.wings=2"], "cannot be called with device, compat, wings")


def cut_picture(path):
    Image.effect_noise((40, 40), 50).save(path)
    truncate(path, 200)


PICTURES = {
    "text": (lambda p: p.write_text("hello"), "not a readable image"),
    "empty": (lambda p: p.write_bytes(b""), "not a readable image"),
    "cut": (cut_picture, "not a readable image", "truncated"),
    "small": (lambda p: Image.new("RGB", (7, 30)).save(p), "7x30 px: too small for a 16 px prior", "at least 8 px"),
}


@pytest.mark.parametrize(("write", "fragments"), [(v[0], v[1:]) for v in PICTURES.values()], ids=PICTURES)
def test_picture(refuses, tmp_path, write, fragments):
    (tmp_path / "pictures").mkdir()
    write(tmp_path / "pictures" / "0.png")
    refuses([f"data.dir={tmp_path}/pictures"], "0.png", *fragments)


def test_empty_folder(refuses, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "notes.txt").write_text("none")
    refuses([f"data.dir={tmp_path}/pictures"], "holds no image", ".jpeg")


Y = np.ones((2, 3, 24, 24), np.float32)
MEASUREMENTS = {
    "no y": ({"z": Y}, "no array 'y' (it holds z)"),
    "shape": ({"y": Y[..., :20]}, "(2, 3, 24, 20)", "(N, 3, 24, 24)"),
    "one number": ({"y": np.float32(1)}, "expected real numbers (N, 3, 24, 24)"),
    "text": ({"y": np.array(["a"])}, "expected real numbers (N, 3, 24, 24)"),
    "complex": ({"y": Y.astype(complex)}, "complex128", "expected real numbers"),
    "nan": ({"y": np.where(Y[:1] > 0, np.nan, 0)}, "NaN or infinite"),
    "float32 overflow": ({"y": np.where(Y[:1] > 0, 1e300, 0)}, "NaN or infinite"),
    "none": ({"y": Y[:0]}, "has the ids []"),
    "ids too few": ({"y": Y, "image_ids": np.arange(1)}, "image_ids must be 2 distinct whole numbers"),
    "ids twice": ({"y": Y, "image_ids": np.array([4, 4])}, "image_ids must be 2 distinct whole numbers"),
    "ids negative": ({"y": Y, "image_ids": np.array([-1, 4])}, "image_ids must be 2 distinct whole numbers"),
    "ids fractional": ({"y": Y, "image_ids": np.array([0.5, 4])}, "image_ids must be 2 distinct whole numbers"),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize(("arrays", "fragments"), [(v[0], v[1:]) for v in MEASUREMENTS.values()], ids=MEASUREMENTS)
def test_measurement(refuses, tmp_path, arrays, fragments):
    np.savez(tmp_path / "y.npz", **arrays)
    refuses([f"data.measurement={tmp_path}/y.npz"], "y.npz", *fragments)


@pytest.mark.parametrize("key", ["y", "image_ids"])
def test_pickled_measurement_runs_no_code(refuses, tmp_path, key):
    np.savez(tmp_path / "y.npz", **({"y": Y} | {key: np.array([RunsCode(tmp_path / "ran")], dtype=object)}))
    refuses([f"data.measurement={tmp_path}/y.npz"], f"array '{key}'", "holds Python objects")
    assert not (tmp_path / "ran").exists()


def test_damaged_measurement(refuses, tmp_path):
    np.savez(tmp_path / "whole.npz", y=Y)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[:2000])
    (tmp_path / "flipped.npz").write_bytes(whole[:3000] + b"x" * 100 + whole[3100:])
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "single.npy", Y)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    refuses([f"data.measurement={tmp_path}/cut.npz"], "cut.npz is not a readable .npz file")
    refuses([f"data.measurement={tmp_path}/flipped.npz"], "array 'y' is damaged", "CRC")
    refuses([f"data.measurement={tmp_path}/text.npz"], "text.npz is not a readable .npz file")
    refuses([f"data.measurement={tmp_path}/single.npz"], "single.npz is not an .npz archive")


DATA_SETS = {
    "side": ({"test_images": np.zeros((2, 8, 8, 3), np.uint8)}, "(3, 8, 8), the prior needs (3, 16, 16)"),
    "floats": ({"test_images": np.zeros((2, 16, 16, 3))}, "must be uint8", "float64"),
    "no split": ({"train_images": np.zeros((2, 16, 16, 3), np.uint8)}, "no array 'test_images'"),
    "empty": ({"test_images": np.zeros((0, 16, 16, 3), np.uint8)}, "holds no image"),
}


@pytest.mark.parametrize(("arrays", "fragments"), [(v[0], v[1:]) for v in DATA_SETS.values()], ids=DATA_SETS)
def test_data_set(refuses, tmp_path, arrays, fragments):
    np.savez(tmp_path / "images.npz", **arrays)
    refuses(["data=npz", f"data.path={tmp_path}/images.npz"], *fragments)


def test_a_file_in_the_way_of_save_dir(tiny_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for save_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        assert_refused(tiny_run(f"save_dir={save_dir}"), f"cannot write to {save_dir}", "not a writable folder")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_in_the_way_of_a_subfolder(tiny_run):
    tiny_run.folder.mkdir(parents=True)
    (tiny_run.folder / "records").write_text("mine")
    assert_refused(tiny_run(), "save_dir: cannot write to")
    assert [p.name for p in tiny_run.folder.iterdir()] == ["records"]


def test_a_folder_of_another_run(tiny_run):
    assert tiny_run("data.end_id=1").status == 0
    before = (tiny_run.folder / "config.yaml").read_text(), (tiny_run.folder / "metrics.json").read_text()
    outcome = tiny_run("sampler.mcmc.tau=0.3", "num_samples=2", "save_trajectory=true")
    assert_refused(outcome, "another configuration", "num_samples, sampler.mcmc.tau)", "name=")
    assert before == ((tiny_run.folder / "config.yaml").read_text(), (tiny_run.folder / "metrics.json").read_text())


@pytest.mark.parametrize("text", ["a: [", "- 1", "seed: 1", yaml.safe_dump({"data": 3})])
def test_a_folder_with_a_foreign_config(tiny_run, text):
    tiny_run.folder.mkdir(parents=True)
    (tiny_run.folder / "config.yaml").write_text(text)
    assert_refused(tiny_run(), "config.yaml is not the configuration of a run")
    assert (tiny_run.folder / "config.yaml").read_text() == text
