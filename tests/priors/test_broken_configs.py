"""Whatever is wrong with a JSON file of a prior: it is loaded and computes, or loading it ends in one sentence."""

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from particledaps.priors.checkpoint import load_checkpoint
from particledaps.priors.diffusers_folder import LoadOptions, open_folder
from particledaps.priors.embedded import load_embedded
from particledaps.priors.prior import PriorError
from particledaps.priors.trial import check_network

NAMES = ("config.json", "scheduler_config.json", "model_index.json", "card.json")
GARBAGE = [{"a": [{"b": None}]}]
PRIORS = ("ldm_ffhq", "ldm_imagenet", "adm", "stable_diffusion", "ddpm", "embedded")
MISSING = object()
WHOLE = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "empty object": lambda text: "{}",
    "a list": lambda text: f"[{text}]",
    "a number": lambda text: "7",
    "null": lambda text: "null",
    "NaN": lambda text: "NaN",
    "not UTF-8": lambda text: b"\xff\xfe\x00",
    "nested without end": lambda text: "[" * 100_000,
}
VALUES = {
    "null": None,
    "true": True,
    "string": "x",
    "number in a string": "8",
    "empty string": "",
    "negative": -1,
    "zero": 0,
    "fraction": 0.5,
    "huge": 10**12,
    "beyond float": 10**400,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "empty list": [],
    "list of strings": ["x", "y"],
    "list of numbers": [1, 2],
    "list of negatives": [-1, -1],
    "empty object": {},
    "garbage": GARBAGE,
}


def load(folder):
    if (folder / "denoiser.safetensors").is_file():
        return load_embedded(folder)
    return load_checkpoint(open_folder(str(folder), Path("/")), "diffusers", LoadOptions())


def outcome(folder):
    """The sentence that a prior is refused with, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prior = load(folder)
            with torch.no_grad():  # what is loaded computes
                z = torch.zeros(1, *prior.latent_shape)
                assert prior.denoiser(z, 0.5).shape == z.shape
                x = prior.decode(z)
                assert x.shape[1:] == prior.image_shape and prior.encode(x).shape == z.shape
    except PriorError as error:
        return str(error)
    return None


def keys_of(config, prefix=()):
    for key, value in config.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*prefix, key))


def edited(config, path, value):
    """A copy in which one entry, however deep, is another; ``MISSING``: is not there."""
    changed = json.loads(json.dumps(config))
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner.pop(path[-1]) if value is MISSING else inner.update({path[-1]: value})
    return changed


@pytest.fixture
def copy(checkpoints, tiny_prior, tmp_path):
    """Call it with a name: a copy of that prior that may be changed."""
    sources = dict(checkpoints) | {"embedded": tiny_prior}
    return lambda name: Path(shutil.copytree(sources[name], tmp_path / name))


def json_files(folder):
    return sorted(path for path in folder.rglob("*.json") if path.name in NAMES)


@pytest.mark.parametrize("name", PRIORS)
def test_a_file_that_is_broken_as_a_whole(copy, name):
    folder = copy(name)
    assert outcome(folder) is None
    for file in json_files(folder):
        text = file.read_text()
        for kind, edit in WHOLE.items():
            content = edit(text)
            file.write_bytes(content) if isinstance(content, bytes) else file.write_text(content)
            said = outcome(folder)
            assert said is None or ("\n" not in said and len(said) < 700), (file, kind, said)
            read = file.name != "model_index.json" and not (file.name == "card.json" and kind == "empty object")
            assert not read or (said is not None and str(file) in said), (file, kind, said)
        file.write_text(text)


@pytest.mark.parametrize("name", PRIORS)
def test_an_entry_that_is_broken(copy, name):
    """A random share of every entry times every value; all of them were tried once."""
    folder, generator = copy(name), random.Random(name)
    for file in json_files(folder):
        text = file.read_text()
        config = json.loads(text)
        entries = [(path, value) for path in keys_of(config) for value in (MISSING, *VALUES.values())]
        for path, value in generator.sample(entries, min(4, len(entries))):
            file.write_text(json.dumps(edited(config, path, value)))
            said = outcome(folder)
            assert said is None or ("\n" not in said and len(said) < 700), (file, path, value, said)
        file.write_text(text)


SAID = {
    "layers": (
        "adm",
        "unet/config.json",
        "layers_per_block",
        10**12,
        "layers_per_block=1000000000000: must be at",
    ),
    "widths": ("adm", "unet/config.json", "block_out_channels", [16, 10**5], "describes a network of"),
    "no widths": ("adm", "unet/config.json", "block_out_channels", "x", "describes no UNet2DModel (ValueError"),
    "type": ("adm", "unet/config.json", "act_fn", "x", "describes no UNet2DModel (ValueError: activation function x"),
    "class": ("adm", "unet/config.json", "_class_name", ["x"], "describes a ['x']; UNet2DModel is needed here"),
    "side": ("adm", "unet/config.json", "sample_size", -1, "sample_size=-1: must be a side in pixels, 1 to 16384"),
    "sides": ("ldm_ffhq", "vae/config.json", "sample_size", "x", "sample_size=x: must be a side in pixels"),
    "no steps": ("ddpm", "scheduler_config.json", "num_train_timesteps", -1, "num_train_timesteps=-1 is not from 2"),
    "many steps": ("ddpm", "scheduler_config.json", "num_train_timesteps", 10**12, "is not from 2 to 1000000"),
    "a beta": ("ddpm", "scheduler_config.json", "beta_start", 10**400, "no readable betas"),
    "prediction": ("ddpm", "scheduler_config.json", "prediction_type", ["x"], "prediction_type=['x']: allowed are"),
    "scheduler": ("ddpm", "scheduler_config.json", "_class_name", ["x"], "['x'] says more of its network than betas"),
    "null class": ("ldm_imagenet", "card.json", "null_class", "x", "null_class=x: must be a class, or null"),
    "range": ("ldm_imagenet", "card.json", "image_range", 7, "image_range=7: only networks of images in [-1, 1]"),
    "scale": ("ldm_imagenet", "card.json", "latent_scale", 10**400, "latent_scale=1000"),
    "deviation": ("embedded", "config.json", "sigma_data", 10**400, "must be finite and greater than 0"),
    "patch": ("embedded", "config.json", "patch", 5, "patch, latent_mean and latent_std do not fit the autoencoder"),
    "denoiser": ("embedded", "config.json", "denoiser", {}, "describes a network of"),
}


@pytest.mark.parametrize(("name", "file", "key", "value", "words"), SAID.values(), ids=SAID)
def test_what_is_said(copy, name, file, key, value, words):
    folder = copy(name)
    path = folder / file
    path.write_text(json.dumps(edited(json.loads(path.read_text()), (key,), value)))
    said = outcome(folder)
    assert said is not None and words in said and str(path) in said


def test_latents_of_another_side_than_the_denoisers(copy):
    folder = copy("embedded")
    path = folder / "config.json"
    path.write_text(json.dumps(edited(json.loads(path.read_text()), ("denoiser", "sample_size"), 8)))
    assert "the sample_size or channels of autoencoder and denoiser do not fit" in outcome(folder)


def test_a_network_is_tried_without_storage(checkpoints):
    """The trial neither needs memory nor lets a fault pass: the same network with one odd width."""
    path = checkpoints["adm"] / "unet" / "config.json"
    config = json.loads(path.read_text())
    check_network(UNet2DModel, config, 10**9, path)
    with pytest.raises(PriorError, match=r"a network of [\d,]+ weights, which 999 bytes of files cannot hold"):
        check_network(UNet2DModel, config, 999, path)
    with pytest.raises(PriorError, match="cannot compute"):
        check_network(UNet2DModel, config | {"downsample_padding": "x", "freq_shift": "x"}, 10**9, path)
