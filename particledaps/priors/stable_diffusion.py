"""Stable Diffusion 1.5 / 2.1 and other text-conditional latent networks in diffusers' layout.

A prompt is embedded once, on the CPU in float32, and the text encoder is released again. transformers is imported
where it is used; ``prompt_embeddings.safetensors`` in the folder (one tensor ``(L, D)`` a prompt, named by the prompt)
makes it unnecessary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from particledaps.priors.conditioning import Condition, Conditions
from particledaps.priors.diffusers_folder import UNREADABLE, CheckpointFolder, LoadOptions, load_network, read_json
from particledaps.priors.errors import PriorError
from particledaps.priors.folder_facts import ready_denoiser
from particledaps.priors.latent_diffusion import latent_prior
from particledaps.priors.prior import Prior
from particledaps.priors.unet import ConditionalUNet
from particledaps.priors.weight_files import find_weights, load_table

EMBEDDINGS = "prompt_embeddings.safetensors"


def load_stable_diffusion(folder: CheckpointFolder, options: LoadOptions) -> Prior:
    """A latent prior that takes a text; loaded with ``options.prompt``.

    Raises:
        PriorError: the folder is damaged, or needs a package that is not installed.
    """
    unet = load_network(folder.unet, (UNet2DConditionModel,))
    asked = [options.prompt] if options.guidance_scale == 1 else [options.prompt, options.negative_prompt or ""]
    known = dict(zip(asked, embed_prompts(folder, asked), strict=True))  # the text encoder is loaded once for all

    def build(condition: Condition) -> nn.Module:
        text = str(condition)
        if text not in known:
            known[text] = embed_prompts(folder, [text])[0]
        if (width := known[text].shape[-1]) != unet.config.cross_attention_dim:
            raise PriorError(
                f"{folder.name}: prompts have {width} features, the U-Net wants {unet.config.cross_attention_dim}"
            )
        return ready_denoiser(ConditionalUNet(unet, known[text]), folder, options)

    conditions = Conditions("prompt", build, null="")
    return latent_prior(folder, options, unet, conditions.denoiser(options.prompt, folder.name), conditions)


def embed_prompts(folder: CheckpointFolder, prompts: list[str]) -> list[torch.Tensor]:
    """Features ``(L, D)`` of each prompt, float32 on the CPU.

    Raises:
        PriorError: no text encoder, no transformers, or a prompt that is too long.
    """
    path = folder.path / EMBEDDINGS
    table = load_table(path) if path.is_file() else {}
    if all(prompt in table for prompt in prompts):
        return [table[prompt].float() for prompt in prompts]
    if not all(folder.component(name) for name in ("text_encoder", "tokenizer")):
        known = ", ".join(map(repr, table)) or "none"
        raise PriorError(
            f"{folder.name} has no text_encoder and tokenizer, and {EMBEDDINGS} lacks model.prompt={prompts[0]!r} "
            f"(it holds {known})"
        )
    return _encode(folder, prompts)


def _encode(folder: CheckpointFolder, prompts: list[str]) -> list[torch.Tensor]:
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise PriorError(
            f"{folder.name}: embedding a prompt needs the package transformers (pip install transformers), or "
            f"{EMBEDDINGS} in the folder"
        ) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder.path / "tokenizer", local_files_only=True)
        positions = read_json(folder.path / "text_encoder" / "config.json").get("max_position_embeddings", 77)
        tokens = _tokens(folder, tokenizer, prompts, min(tokenizer.model_max_length, positions))
        encoder = _text_encoder(CLIPTextModel, folder.path / "text_encoder")
    except PriorError:
        raise
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise PriorError(f"{folder.name}: tokenizer or text_encoder cannot be read: {reason}") from error
    with torch.no_grad():
        return [encoder.eval()(ids)[0][0] for ids in tokens]


def _text_encoder(kind: Any, folder: Path) -> Any:
    stem = "model" if any(folder.glob("model*.safetensors")) else "pytorch_model"
    variant = find_weights(folder, stem).variant
    return kind.from_pretrained(folder, variant=variant, local_files_only=True, dtype=torch.float32)


def _tokens(folder: CheckpointFolder, tokenizer: Any, prompts: list[str], length: int) -> list[torch.Tensor]:
    for prompt in prompts:
        if (count := len(tokenizer(prompt).input_ids)) > length:
            raise PriorError(f"model.prompt has {count} tokens, {folder.name} takes at most {length}: shorten it")
    padding = {"padding": "max_length", "max_length": length, "return_tensors": "pt"}
    return [tokenizer(prompt, **padding).input_ids for prompt in prompts]
