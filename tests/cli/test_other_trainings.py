"""Folders of networks trained otherwise, through the command line: rectified flow, v with zero terminal SNR."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import QUICK, command, no_lpips, reconstruct, write_images  # noqa: F401 (fixture)
from tiny_checkpoints import PIXEL, unconditional_unet, write_scheduler

from particledaps.diffusion.denoiser import FlowDenoiser, VDenoiser
from particledaps.priors.checkpoint import load_checkpoint
from particledaps.priors.diffusers_folder import LoadOptions, open_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """16 px images, a flow scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    path = tmp_path_factory.mktemp("flow") / "flow"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unconditional_unet(3, 16).save_pretrained(path / "unet")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(path / "scheduler")
    return path


def loaded(path):
    return load_checkpoint(open_folder(str(path), path.parent), "diffusers", LoadOptions())


def ran(path, tmp_path):
    """A reconstruction and two samples."""
    images = write_images(tmp_path / "images", 1)
    own = ["model=diffusers", f"model.path={path}", f"data.dir={images}", "data=folder", f"save_dir={tmp_path}/results"]
    outcome = reconstruct(*own, *QUICK, "num_samples=2", "name=run", "save_trajectory=false")
    assert outcome.status == 0, outcome.err
    with np.load(tmp_path / "results" / "run" / "floats" / "00000.npz") as arrays:
        assert np.isfinite(arrays["estimates"]).all()
    outcome = command("generate", *own[:2], "count=2", "num_steps=3", "solver=dpmpp2m", f"out={tmp_path}/samples")
    assert outcome.status == 0, outcome.err
    assert Image.open(tmp_path / "samples" / "00001.png").size == (16, 16)


def test_a_flow_folder_end_to_end(folder, tmp_path):
    ran(folder, tmp_path)


def test_a_flow_folder_is_the_network_in_flow_coordinates(folder):
    prior, z = loaded(folder), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert isinstance(prior.denoiser, FlowDenoiser) and prior.denoiser.noise.sigma_max == 1e3
    velocity = prior.denoiser.network.unet(z / 4, torch.tensor([750.0, 750.0])).sample
    torch.testing.assert_close(prior.denoiser(z, 3.0), z / 4 - 0.75 * velocity, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"invert_sigmas": True}, "invert_sigmas=True is not supported"),
        ({"num_train_timesteps": 1}, "num_train_timesteps=1: must be from 2"),
        ({"newer": 3}, "FlowMatchEulerDiscreteScheduler has no newer=3"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "FlowMatchHeunDiscreteScheduler has beta_schedule=None"),
    ],
)
def test_flow_schedulers_that_are_refused(folder, tmp_path, change, fragment):
    path = shutil.copytree(folder, tmp_path / "copy")
    file = path / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    outcome = command("generate", "model=diffusers", f"model.path={path}", "count=1", f"out={tmp_path}/x")
    assert outcome.status == 2 and fragment in outcome.err and "Traceback" not in outcome.err


def test_v_with_zero_terminal_snr_end_to_end(folder, tmp_path):
    path = shutil.copytree(folder, tmp_path / "v")
    write_scheduler(path, PIXEL | {"rescale_betas_zero_snr": True}, "v_prediction")
    prior = loaded(path)
    assert isinstance(prior.denoiser, VDenoiser) and prior.denoiser.noise.sigma_max == 1e3
    ran(path, tmp_path)
