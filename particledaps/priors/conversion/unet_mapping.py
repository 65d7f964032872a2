"""The same U-Net as a diffusers network: its configuration and the name of every tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

from particledaps.priors.conversion.mapping import (
    Entry,
    Shapes,
    covers,
    leading_rows,
    pointwise,
    query_key_value,
    same,
    shapes_of,
)
from particledaps.priors.conversion.unet import GROUPS, UNetArchitecture
from particledaps.priors.errors import PriorError

RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTER = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


@dataclass(frozen=True)
class Heads:
    """How attention is divided into heads, which shapes do not tell.

    Attributes:
        channels: width of a head; None where the number is fixed instead.
        number: heads of every attention, where ``channels`` is None.
        legacy: rows of ``qkv`` are ordered by head first.
    """

    channels: int | None = None
    number: int = 1
    legacy: bool = True

    def count(self, width: int) -> int:
        """Heads of an attention over ``width`` channels.

        Raises:
            PriorError: they do not divide it.
        """
        parts = self.channels or self.number
        if width % parts:
            key = "num_head_channels" if self.channels else "num_heads"
            raise PriorError(
                f"{key}={parts} does not divide the U-Net's {width} channels; set {key} of the architecture"
            )
        return width // self.channels if self.channels else self.number


def build_network(architecture: UNetArchitecture, heads: Heads, sample_size: int) -> nn.Module:
    """The diffusers network without storage (on the meta device).

    Raises:
        PriorError: diffusers has no network of this architecture.
    """
    conditional = architecture.context_dim is not None
    if conditional and architecture.resblock_updown:
        raise PriorError("cross attention with residual resampling has no counterpart in diffusers")
    _check_widths(architecture)
    config = _common(architecture, sample_size)
    config |= _conditional(architecture, heads) if conditional else _unconditional(architecture, heads)
    with torch.device("meta"):
        return (UNet2DConditionModel if conditional else UNet2DModel)(**config)


def _check_widths(architecture: UNetArchitecture) -> None:
    if any(width % GROUPS for width in architecture.channels):
        raise PriorError(
            f"the U-Net's channels {architecture.channels} are no multiples of {GROUPS}, its normalisation's groups"
        )


def _common(architecture: UNetArchitecture, sample_size: int) -> dict[str, Any]:
    learned = architecture.learned_sigma
    return {
        "sample_size": sample_size,
        "in_channels": architecture.in_channels,
        "out_channels": architecture.in_channels if learned else architecture.out_channels,
        "block_out_channels": architecture.channels,
        "layers_per_block": architecture.res_blocks,
        "resnet_time_scale_shift": "scale_shift" if architecture.scale_shift else "default",
        "norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "num_class_embeds": architecture.classes,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }


def _block_types(attention: tuple[bool, ...], with_attention: str, without: str) -> dict[str, tuple[str, ...]]:
    down = tuple((with_attention if a else without).format("Down", "Downsample") for a in attention)
    up = tuple((with_attention if a else without).format("Up", "Upsample") for a in reversed(attention))
    return {"down_block_types": down, "up_block_types": up}


def _unconditional(architecture: UNetArchitecture, heads: Heads) -> dict[str, Any]:
    resample = "resnet" if architecture.resblock_updown else "conv"
    plain = "Resnet{1}Block2D" if architecture.resblock_updown else "{0}Block2D"
    return _block_types(architecture.attention, "Attn{0}Block2D", plain) | {
        "attention_head_dim": _head_width(architecture, heads),
        "attn_norm_num_groups": GROUPS,
        "downsample_type": resample,
        "upsample_type": resample,
    }


def attended_widths(architecture: UNetArchitecture) -> list[int]:
    """Channels of every attention, each width once; the middle always attends."""
    widths = {w for w, a in zip(architecture.channels, architecture.attention, strict=True) if a}
    return sorted(widths | {architecture.channels[-1]})


def unequal_heads(architecture: UNetArchitecture, heads: Heads) -> int | None:
    """The number of heads where it makes heads of unequal width; None where a diffusers configuration can say it.

    ``UNet2DModel`` takes one width for all heads; :func:`particledaps.priors.unet.set_heads` divides its attentions
    afterwards.
    """
    if architecture.context_dim is not None or heads.channels is not None or heads.number == 1:
        return None
    return heads.number if len(attended_widths(architecture)) > 1 else None


def _head_width(architecture: UNetArchitecture, heads: Heads) -> int | None:
    """``UNet2DModel`` takes one width for all heads (None: one head everywhere)."""
    widths = {width // heads.count(width) for width in attended_widths(architecture)}
    one = (heads.channels is None and heads.number == 1) or unequal_heads(architecture, heads) is not None
    return None if one else widths.pop()


def _conditional(architecture: UNetArchitecture, heads: Heads) -> dict[str, Any]:
    pairs = zip(architecture.channels, architecture.attention, strict=True)
    last = len(architecture.channels) - 1
    counts = [heads.count(w) if a or i == last else 1 for i, (w, a) in enumerate(pairs)]
    return _block_types(architecture.attention, "CrossAttn{0}Block2D", "{0}Block2D") | {
        "cross_attention_dim": architecture.context_dim,
        "attention_head_dim": tuple(counts),  # diffusers' name for the number of heads of each level
        "transformer_layers_per_block": architecture.depth,
        "use_linear_projection": architecture.linear,
    }


def map_unet(architecture: UNetArchitecture, heads: Heads, network: nn.Module) -> list[Entry]:
    """Every tensor of the original U-Net and what it becomes in ``network``."""
    shapes = shapes_of(network.state_dict())
    entries = _rename(OUTER, "", "", shapes, architecture)
    for source, target, kind in _layers(architecture):
        if kind == "residual":
            entries += _rename(RESIDUAL, f"{source}.", f"{target}.", shapes, architecture)
        elif kind == "conv":
            entries += _rename({"": ""}, source, target, shapes, architecture)
        elif architecture.context_dim is None:
            entries += _self_attention(source, target, shapes, heads)
        else:
            entries += [same(source + t[len(target) :], t, shapes) for t in shapes if t.startswith(f"{target}.")]
    return covers(entries, shapes)


def _layers(architecture: UNetArchitecture) -> list[tuple[str, str, str]]:
    """Original layer, diffusers layer and kind, from the input to the output."""
    layers = [("middle_block.0", "mid_block.resnets.0", "residual")]
    layers += [("middle_block.1", "mid_block.attentions.0", "attention")]
    layers += [("middle_block.2", "mid_block.resnets.1", "residual")]
    levels, each = len(architecture.channels), architecture.res_blocks + 1
    resampler = ("", "", "residual") if architecture.resblock_updown else (".op", ".conv", "conv")
    for level, attention in enumerate(architecture.attention):
        down, up = 1 + level * each, (levels - 1 - level) * each
        for i in range(each):
            outputs = [(f"output_blocks.{up + i}", f"up_blocks.{levels - 1 - level}", i)]
            inputs = [(f"input_blocks.{down + i}", f"down_blocks.{level}", i)] if i < each - 1 else []
            for source, target, n in inputs + outputs:
                layers.append((f"{source}.0", f"{target}.resnets.{n}", "residual"))
                layers += [(f"{source}.1", f"{target}.attentions.{n}", "attention")] if attention else []
        if level < levels - 1:
            source = f"input_blocks.{down + each - 1}.0{resampler[0]}"
            layers.append((source, f"down_blocks.{level}.downsamplers.0{resampler[1]}", resampler[2]))
        if level > 0:
            source = f"output_blocks.{up + each - 1}.{2 if attention else 1}{resampler[1]}"
            layers.append((source, f"up_blocks.{levels - 1 - level}.upsamplers.0{resampler[1]}", resampler[2]))
    return layers


def _rename(
    names: dict[str, str], source: str, target: str, shapes: Shapes, architecture: UNetArchitecture
) -> list[Entry]:
    entries = []
    for old, new in names.items():
        for leaf in ("weight", "bias"):
            a, b = f"{source}{old}.{leaf}", f"{target}{new}.{leaf}"
            if b in shapes and old == "out.2":
                entries.append(leading_rows(a, b, shapes, architecture.out_channels))
            elif b in shapes:
                entries.append(same(a, b, shapes))
    return entries


def _self_attention(source: str, target: str, shapes: Shapes, heads: Heads) -> list[Entry]:
    count = heads.count(shapes[f"{target}.group_norm.weight"][0])
    entries = []
    for leaf in ("weight", "bias"):
        projections = tuple(f"{target}.to_{part}.{leaf}" for part in "qkv")
        entries.append(same(f"{source}.norm.{leaf}", f"{target}.group_norm.{leaf}", shapes))
        entries.append(query_key_value(f"{source}.qkv.{leaf}", projections, shapes, count, heads.legacy))
        entries.append(pointwise(f"{source}.proj_out.{leaf}", f"{target}.to_out.0.{leaf}", shapes, 1))
    return entries
