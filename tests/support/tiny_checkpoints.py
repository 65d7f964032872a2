"""Checkpoint folders of every family in diffusers' layout, with random weights and seconds of sampling at most."""

import json
import shutil
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from safetensors.torch import save_file

LDM = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
PIXEL = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear", "num_train_timesteps": 1000}
STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
WIDTH = 16
"""Features of a prompt and of a class."""


def write_scheduler(folder, betas, prediction_type="epsilon"):
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "DDIMScheduler", "trained_betas": None, "prediction_type": prediction_type, **betas}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


def write_card(folder, family, size, **facts):
    card = {"family": family, "ema": None, "image_range": [-1, 1], "image_size": size, "num_classes": None}
    (folder / "card.json").write_text(json.dumps(card | facts))


def unconditional_unet(channels, sample_size, **more):
    return UNet2DModel(
        sample_size=sample_size,
        in_channels=channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=8,
        **{
            "out_channels": channels,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **more,
        },
    )


def conditional_unet(channels, **more):
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=1,
        cross_attention_dim=WIDTH,
        **more,
    )


def autoencoder_parts(levels):
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (8,) * (levels - 1) + (16,),
        "norm_num_groups": 4,
    }


def vq_autoencoder():
    return VQModel(latent_channels=3, num_vq_embeddings=64, **autoencoder_parts(3))


def write_ldm_ffhq(folder):
    """32 px, latents (3, 8, 8)."""
    unconditional_unet(3, 8).save_pretrained(folder / "unet")
    vq_autoencoder().save_pretrained(folder / "vae")
    write_scheduler(folder, LDM)
    write_card(folder, "ldm_ffhq256", 32, ema=True, latent_scale=1.0)


def write_ldm_imagenet(folder, classes=1001):
    """32 px, latents (3, 8, 8), a class embedding."""
    conditional_unet(3).save_pretrained(folder / "unet")
    vq_autoencoder().save_pretrained(folder / "vae")
    save_file({"weight": torch.randn(classes, WIDTH)}, folder / "class_embedding.safetensors")
    write_scheduler(folder, LDM)
    write_card(folder, "ldm_imagenet256", 32, ema=False, latent_scale=1.0, num_classes=classes, null_class=1000)


def write_adm(folder):
    """32 px images, learned sigma."""
    more = {
        "out_channels": 6,
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    }
    unconditional_unet(3, 32, **more).save_pretrained(folder / "unet")
    write_scheduler(folder, PIXEL)
    write_card(folder, "adm_ffhq256", 32)


def write_stable_diffusion(folder, prediction_type="epsilon"):
    """64 px, latents (4, 8, 8), two prompts embedded beforehand."""
    conditional_unet(4).save_pretrained(folder / "unet")
    AutoencoderKL(latent_channels=4, **autoencoder_parts(4)).save_pretrained(folder / "vae")
    prompts = {prompt: torch.randn(7, WIDTH) for prompt in ("", "a cat")}
    save_file(prompts, folder / "prompt_embeddings.safetensors")
    write_scheduler(folder, STABLE, prediction_type)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def write_ddpm(folder):
    """32 px images in the old layout: network and scheduler at the top of the folder."""
    unconditional_unet(3, 32).save_pretrained(folder)
    write_scheduler(folder, PIXEL)
    shutil.move(folder / "scheduler" / "scheduler_config.json", folder)
    (folder / "scheduler").rmdir()


def write_text_encoder(folder):
    """A CLIP text encoder and its tokenizer; needs transformers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    letters = [chr(code) for code in range(33, 127)]
    words = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir(parents=True)
    vocabulary = {word: index for index, word in enumerate(words)}
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    facts = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(facts))
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    size = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=len(words), max_position_embeddings=12, **size, **ends)
    CLIPTextModel(config).save_pretrained(folder / "text_encoder")


WRITERS = {
    "ldm_ffhq": write_ldm_ffhq,
    "ldm_imagenet": write_ldm_imagenet,
    "adm": write_adm,
    "stable_diffusion": write_stable_diffusion,
    "ddpm": write_ddpm,
}
MODELS = {  # how the command line names each of them
    "ldm_ffhq": "ffhq256ldm",
    "ldm_imagenet": "imagenet256ldm",
    "adm": "ffhq256ddpm",
    "stable_diffusion": "diffusers",
    "ddpm": "diffusers",
}


@cache
def write_all(root):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, write in WRITERS.items():
            write(root / name)
    return {name: root / name for name in WRITERS}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder of each family by name; shared, not to be written to."""
    return write_all(tmp_path_factory.getbasetemp() / "tiny_checkpoints")
