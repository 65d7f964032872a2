"""Which files of a network's folder are its weights: half-precision variants, shards, and what is none of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from safetensors.torch import load_file, save_file
from tiny_checkpoints import WRITERS, write_text_encoder

from particledaps.priors.checkpoint import load_checkpoint
from particledaps.priors.diffusers_folder import LoadOptions, open_folder
from particledaps.priors.prior import PriorError
from particledaps.priors.stable_diffusion import embed_prompts
from particledaps.priors.weight_files import find_weights

STEM = "diffusion_pytorch_model"
KINDS = {kind.__name__: kind for kind in (AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel)}


def load(folder):
    return load_checkpoint(open_folder(str(folder), Path("/")), "diffusers", LoadOptions())


@pytest.fixture
def copy(checkpoints, tmp_path):
    return lambda name: Path(shutil.copytree(checkpoints[name], tmp_path / name))


def network_folders(folder):
    return [path.parent for path in folder.rglob(f"{STEM}.safetensors")]


def saved_again(part, **options):
    """Replace the plain file of a network by what ``save_pretrained`` writes with these options."""
    kind = KINDS[json.loads((part / "config.json").read_text())["_class_name"]]
    network = kind.from_pretrained(part, low_cpu_mem_usage=False)
    (part / f"{STEM}.safetensors").unlink()
    (network.half() if options.get("variant") == "fp16" else network).save_pretrained(part, **options)


def networks(prior):
    yield prior.denoiser.network.unet
    if not prior.is_pixel:
        yield prior.autoencoder.network


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "40KB"}, {"safe_serialization": False}], ids=str)
@pytest.mark.parametrize("name", WRITERS)
def test_half_precision_alone_is_the_network_to_half_precision(checkpoints, copy, name, options):
    folder, plain = copy(name), load(checkpoints[name])
    for part in network_folders(folder):
        saved_again(part, variant="fp16", **options)
        assert not (part / f"{STEM}.safetensors").exists()
    half = load(folder)
    for found, wanted in zip(networks(half), networks(plain), strict=True):
        for key, value in wanted.state_dict().items():
            assert torch.equal(found.state_dict()[key], value.half().float()), key
    z = normal(2, *plain.latent_shape)
    with torch.no_grad():
        assert torch.allclose(half.denoiser(z, 0.7), plain.denoiser(z, 0.7), atol=5e-3)
        assert torch.allclose(half.decode(z), plain.decode(z), atol=2e-2)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_are_the_network(checkpoints, copy, suffix):
    folder, plain = copy("ldm_ffhq"), load(checkpoints["ldm_ffhq"])
    for part in network_folders(folder):
        saved_again(part, max_shard_size="40KB", safe_serialization=suffix == "safetensors")
        assert len(find_weights(part).files) > 1
    for found, wanted in zip(networks(load(folder)), networks(plain), strict=True):
        assert all(torch.equal(found.state_dict()[k], v) for k, v in wanted.state_dict().items())


@pytest.mark.parametrize("damage", ["other numbers", "cut"])
def test_the_plain_file_is_taken_where_both_are_there(checkpoints, copy, damage):
    folder, plain = copy("adm"), load(checkpoints["adm"])
    part, (file,) = folder / "unet", find_weights(folder / "unet").files
    half = part / f"{STEM}.fp16.safetensors"
    save_file({name: 3 * value.half() for name, value in load_file(file).items()}, half)
    half.write_bytes(half.read_bytes()[: 99 if damage == "cut" else None])
    found = load(folder)
    assert all(torch.equal(v, plain.denoiser.state_dict()[k]) for k, v in found.denoiser.state_dict().items())


def test_a_plain_pickle_comes_before_half_precision(copy):
    part = copy("adm") / "unet"
    plain = part / f"{STEM}.safetensors"
    plain.rename(part / f"{STEM}.fp16.safetensors")
    torch.save(load_file(part / f"{STEM}.fp16.safetensors"), part / f"{STEM}.bin")
    assert find_weights(part).files == [part / f"{STEM}.bin"] and find_weights(part).variant is None


def refusal(folder):
    with pytest.raises(PriorError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (f"{STEM}.non_ema.safetensors", f"{STEM}.non_ema.safetensors, which may be other weights than the network's"),
        ("model.safetensors", f"holds no weights ({STEM}.safetensors), only model.safetensors"),
        ("diffusion_flax_model.msgpack", f"holds no weights ({STEM}.safetensors), only diffusion_flax_model.msgpack"),
        ("readme.txt", f"holds no weights ({STEM}.safetensors): fetch"),
    ],
)
def test_other_files_are_named(copy, name, words):
    folder = copy("adm")
    (folder / "unet" / f"{STEM}.safetensors").rename(folder / "unet" / name)
    assert words in refusal(folder)


def test_incomplete_shards(copy):
    folder = copy("adm")
    saved_again(folder / "unet", max_shard_size="40KB")
    shards = find_weights(folder / "unet").files
    index = folder / "unet" / f"{STEM}.safetensors.index.json"
    text = index.read_text()
    index.unlink()
    assert f"{STEM}.safetensors.index.json is missing" in refusal(folder)
    index.write_text("{")
    assert "its weights and config.json do not make a UNet2DModel" in refusal(folder)
    index.write_text(text)
    shards[1].unlink()
    assert f"holds {len(shards) - 1} of {len(shards)} shards" in refusal(folder)


def test_a_text_encoder_of_half_precision(copy):
    pytest.importorskip("transformers")
    folder = copy("stable_diffusion")
    (folder / "prompt_embeddings.safetensors").unlink()
    write_text_encoder(folder)
    opened = open_folder(str(folder), Path("/"))
    (plain,) = embed_prompts(opened, ["a cat"])
    file = folder / "text_encoder" / "model.safetensors"
    metadata = {"format": "pt"}
    half = {name: value.half() if value.is_floating_point() else value for name, value in load_file(file).items()}
    save_file(half, file.with_name("model.fp16.safetensors"), metadata)
    file.unlink()
    (found,) = embed_prompts(opened, ["a cat"])
    assert found.dtype == torch.float32 and not torch.equal(found, plain)
    assert torch.allclose(found, plain, atol=2e-2)
