"""Does a configuration describe a network that can be built and computes what is needed? Tried without storage.

diffusers checks little of a ``config.json``: a broken one fails anywhere between building and the first image, or asks
for more memory than there is. On torch's meta device shapes and types are computed, and no number is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel
from torch import nn

from particledaps.priors.errors import PriorError

REPEATED = ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block")
MOST_LAYERS, LARGEST_SIDE = 100, 16_384
TRIED_SIDE = 8
_SIZES: dict[tuple[str, str], int] = {}
"""Weights of the networks of this process that could compute, by class and configuration."""


def check_network(kind: type[nn.Module], config: Mapping[str, Any], stored: int, path: Path) -> None:
    """Build a network without storage and let it compute shapes.

    Args:
        kind: the diffusers class.
        config: its configuration.
        stored: bytes of its files of weights.
        path: of the configuration, for messages.

    Raises:
        PriorError: the network cannot be built, is far larger than its weights, or cannot compute.
    """
    key = kind.__name__, json.dumps(config, sort_keys=True, default=str)
    _check_layers(config, path)
    network = None
    if key not in _SIZES:
        network = _tried(lambda: _build(kind, config), f"{path} describes no {kind.__name__}")
        if network is None:
            return
    size = _SIZES[key] if network is None else sum(p.numel() for p in network.parameters())
    if size > stored:
        raise PriorError(f"{path} describes a network of {size:,} weights, which {stored:,} bytes of files cannot hold")
    if network is not None:
        check_side(network.config.sample_size, path)
        _tried(lambda: _compute(network), f"{path} describes a {kind.__name__} that cannot compute")
        _SIZES[key] = size


def check_side(size: Any, path: Path) -> None:
    """``sample_size`` is a side of a picture, or two, or unsaid.

    Raises:
        PriorError: it is something else.
    """
    sides = size if isinstance(size, list | tuple) else [size]
    if size is not None and not all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in sides):
        raise PriorError(f"{path}: sample_size={str(size)[:60]}: must be a side in pixels, 1 to {LARGEST_SIDE}")


def _check_layers(config: Mapping[str, Any], path: Path) -> None:
    """So many layers would be built one after the other before anything else could be noticed."""
    for key in REPEATED:
        for number in _numbers(config.get(key)):
            if not 0 <= number <= MOST_LAYERS:
                raise PriorError(f"{path}: {key}={str(config[key])[:60]}: must be at most {MOST_LAYERS} layers")


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [number for item in value for number in _numbers(item)]
    return [value] if isinstance(value, int | float) else []


def _tried(call: Callable[[], Any], otherwise: str) -> Any:
    try:
        with torch.no_grad():
            return call()
    except NotImplementedError:  # of the meta device, which lacks a few operations
        return None
    except Exception as error:  # third-party code given unchecked values can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        raise PriorError(f"{otherwise} ({reason})") from error


def _build(kind: type[nn.Module], config: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return kind.from_config(dict(config))


def _compute(network: nn.Module) -> None:
    """One small forward pass; the output has as many rows and columns as the input."""
    config, device = network.config, {"device": "meta"}
    halvings = len(config.block_out_channels) - 1
    x = torch.zeros(2, config.in_channels, *[TRIED_SIDE * 2**halvings] * 2, **device)
    found = _output(network.eval(), x)
    if found.ndim != 4 or found.shape[-2:] != x.shape[-2:]:
        raise ValueError(f"{tuple(x.shape)} becomes {tuple(found.shape)}")


def _output(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    times, config = torch.ones(len(x), device=x.device), network.config
    if isinstance(network, AutoencoderKL):
        return network.decode(network.encode(x).latent_dist.mean).sample
    if isinstance(network, VQModel):
        return network.decode(network.encode(x).latents, force_not_quantize=True).sample
    if isinstance(network, UNet2DConditionModel):
        return network(x, times, torch.zeros(len(x), 3, config.cross_attention_dim, device=x.device)).sample
    assert isinstance(network, UNet2DModel)
    return network(x, times, class_labels=_labels(network, len(x))).sample


def _labels(network: UNet2DModel, count: int) -> torch.Tensor | None:
    """What a network with classes, or with an embedding of its own, is told besides the noise level."""
    if network.class_embedding is None:
        return None
    if network.config.class_embed_type == "identity":
        return torch.zeros(count, 4 * network.config.block_out_channels[0], device="meta")
    return torch.zeros(count, dtype=torch.long, device="meta")
