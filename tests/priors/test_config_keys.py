"""A key that changes a network and is not used is refused by name, when the folder is opened."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_checkpoints import LDM, conditional_unet, write_scheduler

from particledaps.priors.checkpoint import load_checkpoint
from particledaps.priors.diffusers_folder import NETWORKS, CheckpointFolder, LoadOptions, load_network, open_folder
from particledaps.priors.prior import PriorError
from particledaps.priors.scheduler import read_scheduler


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refusal(folder):
    with pytest.raises(PriorError) as error:
        load_checkpoint(open_folder(str(folder), Path("/")), "diffusers", LoadOptions())
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def copy(checkpoints, tmp_path):
    return lambda name: Path(shutil.copytree(checkpoints[name], tmp_path / name))


UNUSED = {
    "time_cond_proj_dim": 256,
    "addition_embed_type": "text_time",
    "encoder_hid_dim": 64,
    "encoder_hid_dim_type": "text_proj",
    "class_embed_type": "timestep",
    "num_class_embeds": 10,
    "attention_type": "gated",
}


@pytest.mark.parametrize("key", UNUSED)
@pytest.mark.parametrize("name", ["stable_diffusion", "ldm_imagenet"])
def test_a_condition_of_a_unet_that_nothing_gives(copy, name, key):
    folder = copy(name)
    change(folder / "unet" / "config.json", **{key: UNUSED[key]})
    assert refusal(folder).startswith(f"{folder / 'unet' / 'config.json'}: {key}={UNUSED[key]} ")


def test_a_latent_consistency_network_is_refused(copy):
    """It runs without its guidance embedding, and computes something else."""
    folder = copy("stable_diffusion")
    conditional_unet(4, time_cond_proj_dim=8).save_pretrained(folder / "unet")
    assert "time_cond_proj_dim=8 embeds the guidance scale" in refusal(folder)


@pytest.mark.parametrize(("key", "value"), [("class_embed_type", "identity"), ("time_embedding_type", "learned")])
def test_a_pixel_network_of_another_time_or_class(copy, key, value):
    folder = copy("adm")
    change(folder / "unet" / "config.json", **{key: value})
    assert f"{key}={value} is not supported" in refusal(folder)


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_key_that_diffusers_does_not_know(copy, part):
    """diffusers would warn and drop it."""
    folder = copy("stable_diffusion")
    path = folder / part / "config.json"
    change(path, latent_mean=[1.0], newer=None, off=False, _private=3, decay=0.99)
    text = refusal(folder)
    assert text.startswith(f"{path}: a ") and " has no latent_mean=[1.0]: misspelt" in text
    change(path, latent_mean=None)
    assert load_network(folder / part, tuple(NETWORKS.values())).config.decay == 0.99


SCHEDULERS = {
    "EDM": ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDMEulerScheduler says more of its network"),
    "consistency": ({"_class_name": "LCMScheduler"}, "LCMScheduler says more of its network than betas"),
    "unknown": ({"_class_name": "MyScheduler"}, "MyScheduler says more of its network than betas"),
    "cogvideox": (
        {"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0},
        "CogVideoXDDIMScheduler says more",
    ),
    "shift": ({"snr_shift_scale": 3.0}, "DDIMScheduler has no snr_shift_scale=3.0"),
    "sigma_data": ({"sigma_data": 0.5}, "DDIMScheduler has no sigma_data=0.5"),
    "flow": ({"use_flow_sigmas": True}, "use_flow_sigmas=True (flow matching) is not supported"),
    "continuous": ({"timestep_type": "continuous"}, "timestep_type=continuous is not supported"),
    "flow backwards": (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
        "invert_sigmas=True is not supported",
    ),
    "zero snr": ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=true with prediction_type=epsilon"),
    "old prediction": ({"predict_epsilon": False}, "predict_epsilon=False is the old name"),
    "old steps": ({"timesteps": 500}, "DDIMScheduler has no timesteps=500"),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_a_scheduler_that_betas_do_not_describe(tmp_path, case):
    entries, cause = SCHEDULERS[case]
    write_scheduler(tmp_path, LDM | entries)
    with pytest.raises(PriorError) as error:
        read_scheduler(CheckpointFolder("mine", tmp_path))
    path = tmp_path / "scheduler" / "scheduler_config.json"
    assert str(error.value).startswith(f"{path}: {cause}") and "\n" not in str(error.value)


PUBLISHED = {
    "Stable Diffusion 1.5": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "clip_sample": False},
    "Stable Diffusion 2.1": {"_class_name": "DDIMScheduler", "skip_prk_steps": True, "steps_offset": 1},
    "an Euler scheduler": {"_class_name": "EulerDiscreteScheduler", "timestep_type": "discrete", "sigma_max": None},
    "the first diffusers": {"_class_name": "DDIMScheduler", "tensor_format": "pt", "timesteps": 1000},
    "of no class": {"_class_name": None},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_the_sampler_alone_are_let_through(tmp_path, name):
    write_scheduler(tmp_path, LDM | PUBLISHED[name])
    assert read_scheduler(CheckpointFolder("mine", tmp_path))["beta_end"] == LDM["beta_end"]


@pytest.mark.parametrize(
    "name", ["DDPM", "DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"]
)
def test_what_diffusers_itself_saves_is_let_through(tmp_path, name):
    import diffusers

    getattr(diffusers, f"{name}Scheduler")(beta_schedule="scaled_linear").save_pretrained(tmp_path / "scheduler")
    assert read_scheduler(CheckpointFolder("mine", tmp_path))["beta_schedule"] == "scaled_linear"
