"""Checkpoints of every family through ``posterior_sample.py``, and what it says to folders that cannot be used."""

import json
import os
import shutil
import sys

import metrics_schema
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_bad_input import RunsCode, assert_refused, truncate
from tiny import command, reconstruct, write_images
from tiny_checkpoints import LDM, MODELS, PIXEL, checkpoints, write_scheduler, write_text_encoder  # noqa: F401

SIZES = {"ldm_ffhq": 32, "ldm_imagenet": 32, "adm": 32, "stable_diffusion": 64, "ddpm": 32}
FEW = ("sampler.annealing.num_steps=2", "sampler.mcmc.num_steps=2", "num_samples=2", "data.end_id=1", "device=cpu")
FAMILY = {"adm": "pixel", "ddpm": "pixel", "stable_diffusion": "sd"}
PIXEL_ODE, LATENT_ODE = {"num_steps": 5, "sigma_min": 0.01}, {"num_steps": 2, "sigma_min": 0.001}


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("large"), 1, size=(64, 64))


@pytest.fixture
def run(images, tmp_path, no_sheets):
    """Call it with overrides: the outcome; results in ``tmp_path / "results" / "tiny"``."""
    common = ("data=folder", f"data.dir={images}", "name=tiny", f"save_dir={tmp_path}/results", "save_trajectory=false")
    return lambda *overrides: reconstruct(*common, *FEW, *overrides)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_runs_from_end_to_end(run, checkpoints, tmp_path, name):  # noqa: F811
    outcome = run(f"model={MODELS[name]}", f"model.path={checkpoints[name]}")
    assert outcome.status == 0, outcome.err
    metrics = metrics_schema.load(tmp_path / "results" / "tiny" / "metrics.json")
    assert [row["state"] for row in metrics["status"]["per_image"]] == ["ok"]
    written = yaml.safe_load((tmp_path / "results" / "tiny" / "config.yaml").read_text())
    family = FAMILY.get(name, "ldm")
    assert written["model"]["family"] == family
    assert written["sampler"]["annealing"]["sigma_max"] == (100 if family == "pixel" else 10)
    assert written["sampler"]["ode"].items() >= (PIXEL_ODE if family == "pixel" else LATENT_ODE).items()
    with np.load(tmp_path / "results" / "tiny" / "floats" / "00000.npz") as arrays:
        assert arrays["estimates"].shape == (2, 3, SIZES[name], SIZES[name])
        assert np.isfinite(arrays["estimates"]).all()


def test_conditions_change_the_answer(run, checkpoints, tmp_path):  # noqa: F811
    answers = []
    for number, options in enumerate([(), ("model.class_id=3",), ("model.class_id=3", "model.guidance_scale=3")]):
        model = ("model=imagenet256ldm", f"model.path={checkpoints['ldm_imagenet']}")
        assert run(*model, *options, "num_samples=1", f"name=run{number}").status == 0
        with np.load(tmp_path / "results" / f"run{number}" / "floats" / "00000.npz") as arrays:
            answers.append(arrays["estimates"])
    assert not np.allclose(answers[0], answers[1], atol=1e-4) and not np.allclose(answers[1], answers[2], atol=1e-4)


def test_half_precision_and_compat_run(run, checkpoints, tmp_path):  # noqa: F811
    model = ("model=ffhq256ldm", f"model.path={checkpoints['ldm_ffhq']}", "num_samples=1")
    assert run(*model, "precision=float16", "compat=daps", "compat.ema=true").status == 0
    metrics_schema.load(tmp_path / "results" / "tiny" / "metrics.json")


WEIGHTS, UNET = "unet/diffusion_pytorch_model.safetensors", "unet/config.json"
HTML = "<!DOCTYPE html>\n<html><body>quota exceeded</body></html>"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def drop_weight(path, name):
    weights = load_file(path)
    del weights[name]
    save_file(weights, path)


def no_null_class(folder):
    save_file({"weight": torch.zeros(10, 16)}, folder / "class_embedding.safetensors")
    (folder / "card.json").unlink()


def pickled(folder):
    (folder / WEIGHTS).unlink()
    torch.save(RunsCode(folder / "ran"), folder / "unet" / "diffusion_pytorch_model.bin")


DAMAGE = {  # checkpoint, what happens to its folder, further overrides, what the message must hold
    "unet missing": ("ldm_ffhq", lambda f: shutil.rmtree(f / "unet"), (), "unet/config.json is missing"),
    "weights missing": ("ldm_ffhq", lambda f: (f / WEIGHTS).unlink(), (), "holds no weights"),
    "weights cut": ("adm", lambda f: truncate(f / WEIGHTS, -10), (), "truncated download?"),
    "header cut": ("adm", lambda f: truncate(f / WEIGHTS, 100), (), "truncated download?"),
    "weights empty": ("adm", lambda f: truncate(f / WEIGHTS, 0), (), "truncated download?"),
    "web page": ("adm", lambda f: (f / WEIGHTS).write_text(HTML), (), "it is a web page", "download it again"),
    "lfs pointer": ("adm", lambda f: (f / WEIGHTS).write_text(POINTER), (), "git-lfs pointer"),
    "config is a page": ("adm", lambda f: (f / UNET).write_text(HTML), (), "config.json is damaged", "a web page"),
    "pickle": ("adm", pickled, (), "files cannot hold"),
    "other widths": ("adm", lambda f: change(f / UNET, block_out_channels=[16, 64]), (), "UNet2DModel", "shape"),
    "other layers": ("adm", lambda f: change(f / UNET, layers_per_block=2), (), "do not make a UNet2DModel"),
    "weight lost": ("ldm_ffhq", lambda f: drop_weight(f / WEIGHTS, "conv_in.bias"), (), "missing keys conv_in.bias"),
    "other class": ("ldm_ffhq", lambda f: change(f / UNET, _class_name="Flux"), (), "describes a Flux", "UNet2DModel"),
    "no scheduler": ("adm", lambda f: shutil.rmtree(f / "scheduler"), (), "scheduler_config.json is missing"),
    "flow": (
        "adm",
        lambda f: write_scheduler(f, {"_class_name": "FlowMatchHeunDiscreteScheduler"}),
        (),
        "FlowMatchHeunDiscreteScheduler has beta_schedule=None: allowed are linear, scaled_linear",
    ),
    "prediction": ("adm", lambda f: write_scheduler(f, PIXEL, "flow"), (), "prediction_type=flow: allowed are epsilon"),
    "zero snr": (
        "adm",
        lambda f: write_scheduler(f, PIXEL | {"rescale_betas_zero_snr": True}),
        (),
        "rescale_betas_zero_snr=true with prediction_type=epsilon",
        "predict v or the sample",
    ),
    "betas": ("adm", lambda f: write_scheduler(f, PIXEL | {"beta_start": "x"}), (), "no readable betas"),
    "trained betas": ("adm", lambda f: write_scheduler(f, {"trained_betas": [0.1, -0.1]}), (), "no noise schedule"),
    "card size": ("ldm_ffhq", lambda f: change(f / "card.json", image_size=256), (), "image_size=256", "32 px"),
    "card range": ("adm", lambda f: change(f / "card.json", image_range=[0, 1]), (), "image_range=[0, 1]"),
    "averaged": ("ldm_ffhq", lambda f: None, ("compat.ema=false",), "compat.ema=false", "convert_checkpoint.py"),
    "no vae": ("ldm_ffhq", lambda f: shutil.rmtree(f / "vae"), (), "model.kind=ldm: ", "a pixel network (no vae)"),
    "kind": ("ldm_ffhq", lambda f: None, ("model.kind=adm",), "model.kind=adm", "use model.kind=ldm, diffusers"),
    "other channels": ("ldm_ffhq", lambda f: change(f / UNET, in_channels=5), (), "UNet2DModel", "shape"),
    "class": ("ldm_imagenet", lambda f: None, ("model.class_id=1001",), "class_id=1001", "the classes 0 to 1000"),
    "negative class": ("ldm_imagenet", lambda f: None, ("model.class_id=-1",), "model.class_id=-1: must be at least 0"),
    "class of none": ("ldm_ffhq", lambda f: None, ("model.class_id=3",), "model.class_id=3", "no network that takes a"),
    "prompt of none": ("ldm_ffhq", lambda f: None, ("model.prompt=cat",), "model.prompt='cat'", "takes a text"),
    "prompt of pixels": ("adm", lambda f: None, ("model.prompt=cat",), "model.prompt='cat'", "leave it out"),
    "guidance of none": ("adm", lambda f: None, ("model.guidance_scale=2",), "guidance_scale=2", "unconditional"),
    "scale of pixels": ("adm", lambda f: None, ("model.latent_scale=2",), "latent_scale=2", "pixel network"),
    "scale": ("ldm_ffhq", lambda f: None, ("model.latent_scale=0",), "model.latent_scale=0: must be greater than 0"),
    "size of pixels": ("adm", lambda f: None, ("model.image_size=64",), "model.image_size=64", "of 32 px images"),
    "no null class": (
        "ldm_imagenet",
        no_null_class,
        (),
        "model.class_id is not set",
        "choose 0 to 9",
    ),
    "unknown prompt": (
        "stable_diffusion",
        lambda f: None,
        ("model.prompt=a dog",),
        "lacks model.prompt='a dog'",
        "'a cat'",
    ),
    "sdxl": ("stable_diffusion", lambda f: change(f / UNET, addition_embed_type="text_time"), (), "text_time (SDXL"),
}


@pytest.mark.parametrize("case", DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_that_cannot_be_used(run, checkpoints, tmp_path, case):  # noqa: F811
    name, damage, overrides, *fragments = case
    folder = shutil.copytree(checkpoints[name], tmp_path / "copy")
    damage(folder)
    assert_refused(run(f"model={MODELS[name]}", f"model.path={folder}", *overrides), *fragments)
    assert not (tmp_path / "results").exists() and not (folder / "ran").exists()


def test_paths_that_name_no_folder(run, tmp_path):
    assert_refused(
        run("model=ffhq256ldm", "model.path=/not/there"), "model.path=/not/there: no such folder", "download.sh"
    )
    (tmp_path / "ldm.ckpt").write_bytes(b"weights")
    raw = run("model=ffhq256ldm", f"model.path={tmp_path}/ldm.ckpt")
    assert_refused(raw, "is a file", f"python tools/convert_checkpoint.py {tmp_path}/ldm.ckpt {tmp_path}/ldm`")
    (tmp_path / "empty").mkdir()
    assert_refused(run("model=diffusers", f"model.path={tmp_path}/empty"), "is no diffusers folder")


def test_a_hub_id_that_is_not_cached(run, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert_refused(
        run("model=stable-diffusion-v1.5"), "nothing is downloaded", "hf download stable-diffusion-v1-5/stable"
    )


def test_a_path_is_needed():
    assert_refused(command("posterior_sample", "model=diffusers"), "model.path is not set")


def test_images_of_another_size(run, checkpoints, tmp_path):  # noqa: F811
    np.savez(tmp_path / "small.npz", test_images=np.zeros((2, 16, 16, 3), np.uint8))
    model = ("model=ffhq256ldm", f"model.path={checkpoints['ldm_ffhq']}")
    outcome = run(*model, "data=npz", f"data.path={tmp_path}/small.npz")
    assert_refused(outcome, "(3, 16, 16)", "the prior needs (3, 32, 32)")


def test_a_text_encoder_without_transformers(run, checkpoints, tmp_path, monkeypatch):  # noqa: F811
    folder = shutil.copytree(checkpoints["stable_diffusion"], tmp_path / "copy")
    for name in ("text_encoder", "tokenizer"):
        (folder / name).mkdir()
    monkeypatch.setitem(sys.modules, "transformers", None)
    outcome = run("model=diffusers", f"model.path={folder}", "model.prompt=a dog")
    assert_refused(
        outcome, "needs the package transformers (pip install transformers)", "prompt_embeddings.safetensors"
    )


def test_a_prompt_is_embedded_once_by_the_text_encoder(run, checkpoints, tmp_path):  # noqa: F811
    transformers = pytest.importorskip("transformers", reason="transformers, which embeds prompts, is not installed")
    from particledaps.priors.diffusers_folder import CheckpointFolder
    from particledaps.priors.stable_diffusion import embed_prompts

    folder = shutil.copytree(checkpoints["stable_diffusion"], tmp_path / "copy")
    os.remove(folder / "prompt_embeddings.safetensors")
    write_text_encoder(folder)
    calls, forward = [], transformers.CLIPTextModel.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.CLIPTextModel, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
        outcome = run("model=diffusers", f"model.path={folder}", "model.prompt=dog")
    assert outcome.status == 0, outcome.err
    assert len(calls) == 1
    dog, empty = embed_prompts(CheckpointFolder("tiny", folder), ["dog", ""])
    assert dog.shape == (12, 16) and torch.equal(dog[0], empty[0]) and not torch.allclose(dog[1:], empty[1:])
    outcome = run("model=diffusers", f"model.path={folder}", "model.prompt=a much too long prompt", "name=long")
    assert_refused(outcome, "tokens, copy takes at most 12")
