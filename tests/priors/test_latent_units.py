"""Scale, shift and spread between the latents of an autoencoder and those of its denoiser."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tiny_checkpoints import LDM, autoencoder_parts, unconditional_unet, vq_autoencoder, write_scheduler

from particledaps.priors.checkpoint import load_checkpoint
from particledaps.priors.diffusers_folder import LoadOptions, open_folder
from particledaps.priors.prior import PriorError

MEAN, STD = [0.1, -0.4, 0.0, 1.5], [1.3, 0.5, 2.0, 1.0]


def load(folder, **options):
    return load_checkpoint(open_folder(str(folder), Path("/")), "diffusers", LoadOptions(**options))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def edit(path, remove=(), **entries):
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in remove}))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("units")
    torch.manual_seed(0)
    for name, channels in (("kl", 4), ("vq", 3)):
        unconditional_unet(channels, 8).save_pretrained(folder / name / "unet")
        write_scheduler(folder / name, LDM)
    AutoencoderKL(latent_channels=4, **autoencoder_parts(3)).save_pretrained(folder / "kl" / "vae")
    vq_autoencoder().save_pretrained(folder / "vq" / "vae")
    return folder


@pytest.fixture
def autoencoder(written, tmp_path):
    """Call it with a kind and entries of vae/config.json: a folder with them."""

    def made(kind, remove=(), **entries):
        folder = Path(shutil.copytree(written / kind, tmp_path / kind))
        edit(folder / "vae" / "config.json", remove, **entries)
        return folder

    return made


FACTS = {
    "shift": {"shift_factor": 0.7},
    "mean": {"latents_mean": MEAN},
    "spread": {"latents_std": STD},
    "mean and spread": {"latents_mean": MEAN, "latents_std": STD},
    "all": {"latents_mean": MEAN, "latents_std": STD, "shift_factor": -0.3},
}


def statistics(facts):
    """Shift and spread by diffusers' formula, ``(1, 4, 1, 1)``, float64."""
    mean, std = (
        torch.tensor(facts.get(k, [d] * 4), dtype=torch.float64) for k, d in zip(KEYS, (0.0, 1.0), strict=True)
    )
    return mean.reshape(1, 4, 1, 1) + facts.get("shift_factor", 0.0), std.reshape(1, 4, 1, 1)


KEYS = ("latents_mean", "latents_std")


@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("name", FACTS)
def test_shift_and_spread_of_the_configuration_are_used_both_ways(autoencoder, name, scale):
    """``latent_scale`` replaces the scaling factor and leaves shift and spread."""
    facts, factor = FACTS[name], scale or 0.5
    prior = load(autoencoder("kl", scaling_factor=0.5, **facts), latent_scale=scale)
    network, z, x = prior.autoencoder.network, normal(2, 4, 8, 8), normal(2, 3, 32, 32, seed=1)
    shift, spread = statistics(facts)
    with torch.no_grad():
        code = network.encode(x).latent_dist.mean
        wanted = network.decode((z * spread / factor + shift).float()).sample
    torch.testing.assert_close(prior.decode(z), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prior.encode(x), ((code - shift) * factor / spread).float(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        assert (wanted - network.decode(z / factor).sample).abs().max() > 1e-3


@pytest.mark.parametrize("unset", [{}, {"shift_factor": None, "latents_mean": None, "latents_std": None}])
def test_without_them_the_arithmetic_is_what_it_was_bit_for_bit(autoencoder, unset):
    prior = load(autoencoder("kl", scaling_factor=0.3, **unset))
    network, z, x = prior.autoencoder.network, normal(2, 4, 8, 8), normal(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(prior.decode(z), network.decode(z / 0.3).sample)
        assert torch.equal(prior.encode(x), 0.3 * network.encode(x).latent_dist.mean)
    assert prior.autoencoder.mean is None and prior.autoencoder.std is None


@pytest.mark.parametrize(
    ("entries", "cause"),
    [
        ({"latents_mean": [0.1, 0.2]}, "latents_mean=[0.1, 0.2]: must be 4 finite numbers"),
        ({"latents_mean": [0.1, 0.2, 0.3, math.nan]}, "latents_mean=[0.1, 0.2, 0.3, nan]: must be 4 finite numbers"),
        ({"latents_std": [1, 2, 3, "4"]}, "latents_std=[1, 2, 3, '4']: must be 4 finite numbers"),
        ({"latents_std": [1.0, 2.0, 0.0, 1.0]}, "latents_std=[1.0, 2.0, 0.0, 1.0]: all must be greater than 0"),
        ({"latents_std": 2.0}, "latents_std=2.0: must be 4 finite numbers"),
        ({"shift_factor": math.inf}, "shift_factor=inf is no finite number"),
        ({"scaling_factor": math.nan}, "scaling_factor=nan: must be greater than 0"),
        ({"scaling_factor": 0}, "scaling_factor=0: must be greater than 0"),
    ],
)
def test_impossible_units_are_refused_by_name(autoencoder, entries, cause):
    folder = autoencoder("kl", **entries)
    with pytest.raises(PriorError) as error:
        load(folder)
    assert str(error.value).startswith(f"{folder / 'vae' / 'config.json'}: {cause}") and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["latent_scale", "latent_std"])
@pytest.mark.parametrize("value", [math.nan, 0, -1.0, "1"])
def test_impossible_units_of_a_card_are_refused(autoencoder, key, value):
    folder = autoencoder("kl")
    (folder / "card.json").write_text(json.dumps({key: value}))
    with pytest.raises(PriorError, match=f"card.json: {key}={value}: must be greater than 0"):
        load(folder)


def test_a_scaling_factor_that_diffusers_writes_for_any_codebook_is_asked_for(autoencoder):
    folder, x = autoencoder("vq"), normal(1, 3, 32, 32)
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.18215
    with pytest.raises(
        PriorError, match=r"scaling_factor=0.18215 .* model.latent_scale=1 .* model.latent_scale=0.18215"
    ):
        load(folder)
    one, stated = (load(folder, latent_scale=scale) for scale in (1.0, 0.18215))
    assert torch.allclose(stated.encode(x), 0.18215 * one.encode(x)) and one.autoencoder.scale == 1.0


@pytest.mark.parametrize(
    ("remove", "entries", "scale"), [((), {"scaling_factor": 0.4}, 0.4), (("scaling_factor",), {}, 1.0)]
)
def test_the_scaling_factor_of_a_codebook_is_used_where_it_is_meant(autoencoder, remove, entries, scale):
    prior, x = load(autoencoder("vq", remove, **entries)), normal(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(prior.encode(x), scale * prior.autoencoder.network.encode(x).latents)
    assert prior.autoencoder.scale == scale


@pytest.mark.parametrize(
    ("stated", "dtype", "kept"),
    [
        (True, torch.float16, torch.float32),
        (True, torch.bfloat16, torch.bfloat16),
        (False, torch.float16, torch.float16),
        (None, torch.float16, torch.float16),
    ],
)
def test_an_autoencoder_that_says_so_is_kept_out_of_float16(autoencoder, stated, dtype, kept):
    remove, entries = (("force_upcast",), {}) if stated is None else ((), {"force_upcast": stated})
    prior = load(autoencoder("kl", remove, latents_mean=MEAN, **entries), dtype=dtype)
    assert prior.autoencoder.network.dtype == kept and prior.denoiser.network.unet.dtype == dtype
    assert prior.decode(normal(1, 4, 8, 8)).dtype == prior.autoencoder.mean.dtype == torch.float32
