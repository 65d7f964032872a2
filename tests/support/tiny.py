"""A complete prior of 16 px images that samples in a fraction of a second, and the command line in this process."""

import copy
import importlib
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

import posterior_sample
from particledaps.priors.autoencoder import KLAutoencoder
from particledaps.priors.embedded import save_embedded
from particledaps.settings.command_line import compose_config
from particledaps.training import autoencoder as stage_one
from particledaps.training import denoiser as stage_two

RESOLUTION = 16
AUTOENCODER = stage_one.AutoencoderSettings(channels=[8, 8], norm_groups=4)
DENOISER = stage_two.DenoiserSettings(
    channels=[8, 8], layers=1, attention_levels=0, norm_groups=4, head_channels=4, noise_scale=50.0
)
LATENTS = stage_two.LatentFacts((4, 4, 4))
GROUPS = ("data", "model", "task", "sampler", "compat", "experiment")
QUICK = (  # values of its own, so that tuning the default sampler changes no test
    "sampler.annealing.num_steps=3",
    "sampler.annealing.sigma_max=10.0",
    "sampler.annealing.sigma_min=0.1",
    "sampler.mcmc.kernel=hmc",
    "sampler.mcmc.num_steps=2",
    "sampler.mcmc.step_size=1.5e-3",
    "sampler.mcmc.momentum=0.6",
    "sampler.mcmc.tau=0.05",
    "device=cpu",
)


def write_tiny_prior(folder, seed=0):
    """Random weights are enough: these tests ask where numbers go, not what they are worth."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = stage_one.build(AUTOENCODER, RESOLUTION)
        unet = stage_two.build(DENOISER, LATENTS)
    autoencoder = KLAutoencoder(network, AUTOENCODER.patch, torch.zeros(4), torch.ones(4))
    save_embedded(Path(folder), autoencoder, stage_two.wrap(unet, DENOISER, LATENTS), {"name": "tiny"})
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_prior(tmp_path_factory):
    """Folder of the tiny prior; shared, not to be written to."""
    return write_tiny_prior(tmp_path_factory.mktemp("prior") / "tiny")


def write_images(folder, count=3, size=(RESOLUTION, RESOLUTION), seed=0):
    """Smooth random colour images ``0.png``, ``1.png``, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Folder of three images; shared, not to be written to."""
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session", autouse=True)
def no_lpips(tmp_path_factory):
    """Keep LPIPS out even where a developer has its weights: half a gigabyte and seconds a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch_home")))
        yield


@pytest.fixture
def no_sheets(monkeypatch):
    """Contact sheets hold their heading only: drawing them takes most of a small run."""
    monkeypatch.setattr("particledaps.runs.drawing.contact_sheet", lambda path, rows, heading: path.write_text(heading))


class Outcome(NamedTuple):
    """What a command leaves behind."""

    status: int
    out: str
    err: str


def captured(function):
    """Call ``function``; its exit status and what it prints."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            function()
    except SystemExit as leave:
        status = leave.code or 0
        if isinstance(status, str):  # sys.exit(message): the interpreter prints it and leaves with 1
            err.write(status)
            status = 1
    return Outcome(status, out.getvalue(), err.getvalue())


def command(program, *arguments):
    """``python <program>.py ARGUMENTS`` in this process."""
    module = importlib.import_module(program)
    configured = {"posterior_sample": "config", "train_prior": "train_prior", "generate": "generate"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
        if program in configured:
            return captured(lambda: module.run(f"{program}.py", configured[program], module.main))
        return captured(module.main)


@cache
def composed(*overrides):
    return compose_config("config", list(overrides))


def reconstruct(*overrides):
    """``posterior_sample.py OVERRIDES`` in this process without Hydra's command line, which takes longer than the rest.

    What the command line refuses raises an exception here.
    """
    groups = [o for o in overrides if o.split("=")[0] in GROUPS or o.startswith("+")]
    config = copy.deepcopy(composed(*groups))
    for override in OverridesParser.create().parse_overrides([o for o in overrides if o not in groups]):
        OmegaConf.update(config, override.key_or_group, override.value())
    return captured(lambda: posterior_sample.main(config))
