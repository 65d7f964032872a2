"""Numbers that are none are refused when a prior is loaded, by file and entry."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from particledaps.priors.checkpoint import load_checkpoint
from particledaps.priors.diffusers_folder import LoadOptions, open_folder
from particledaps.priors.embedded import load_embedded
from particledaps.priors.prior import PriorError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def spoil(path, value=math.nan):
    """One number of one tensor; its name."""
    weights = load_file(path)
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(-1)[-1] = value
    save_file(weights, path)
    return name


def refusal(call, *arguments):
    with pytest.raises(PriorError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def load(folder):
    return load_checkpoint(open_folder(str(folder), Path("/")), "diffusers", LoadOptions())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["autoencoder", "denoiser"])
def test_weights_of_an_embedded_prior(tiny_prior, tmp_path, name, value):
    folder = shutil.copytree(tiny_prior, tmp_path / "prior")
    path = folder / f"{name}.safetensors"
    entry = spoil(path, value)
    assert refusal(load_embedded, folder).startswith(f"{path}: {entry} is not finite (NaN or infinity)")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sigma_data", math.nan),
        ("sigma_data", 0),
        ("sigma_data", -1.0),
        ("sigma_data", math.inf),
        ("noise_scale", math.nan),
        ("noise_scale", 0),
        ("latent_mean", [0, 0, 0, math.nan]),
        ("latent_mean", [0, 0, 0, "0"]),
        ("latent_std", [1, 1, math.nan, 1]),
        ("latent_std", [1, 1, 1, 0]),
        ("latent_std", [1, 1, 1, -2.0]),
    ],
)
def test_statistics_of_an_embedded_prior(tiny_prior, tmp_path, key, value):
    folder = Path(shutil.copytree(tiny_prior, tmp_path / "prior"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    kind = "finite" if key == "latent_mean" else "finite and greater than 0"
    assert refusal(load_embedded, folder).startswith(f"{folder / 'config.json'}: {key}={value}: must be {kind};")


@pytest.mark.parametrize(("name", "part"), [("ldm_ffhq", "unet"), ("ldm_ffhq", "vae"), ("adm", "unet")])
def test_weights_of_a_checkpoint(checkpoints, tmp_path, name, part):
    folder = Path(shutil.copytree(checkpoints[name], tmp_path / "copy"))
    entry = spoil(folder / part / WEIGHTS)
    assert refusal(load, folder).startswith(f"{folder / part / WEIGHTS}: {entry} is not finite")


@pytest.mark.parametrize(
    ("name", "file"),
    [("ldm_imagenet", "class_embedding.safetensors"), ("stable_diffusion", "prompt_embeddings.safetensors")],
)
def test_tables_of_conditions(checkpoints, tmp_path, name, file):
    folder = Path(shutil.copytree(checkpoints[name], tmp_path / "copy"))
    entry = spoil(folder / file, -math.inf)
    assert refusal(load, folder).startswith(f"{folder / file}: {entry} is not finite")


def test_pickled_weights(checkpoints, tmp_path):
    folder = Path(shutil.copytree(checkpoints["adm"], tmp_path / "copy"))
    path = folder / "unet" / WEIGHTS
    entry, weights = spoil(path), load_file(path)
    path.unlink()
    torch.save(weights, path.with_suffix(".bin"))
    assert refusal(load, folder).startswith(f"{path.with_suffix('.bin')}: {entry} is not finite")
