"""First stages of latent diffusion (Esser et al. 2021; Rombach et al. 2022) as ``VQModel`` or ``AutoencoderKL``.

Encoder and decoder are levels of residual blocks around a middle with one-headed attention; the decoder numbers its
levels by resolution, diffusers by execution. A codebook makes it a ``VQModel``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn

from particledaps.priors.conversion.mapping import Entry, Shapes, covers, pointwise, same, shapes_of, sizes
from particledaps.priors.conversion.unet import GROUPS, IMAGE_CHANNELS, vote
from particledaps.priors.errors import PriorError

BLOCK = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.(?:conv1|norm2|conv2)\.(?:weight|bias)")
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
RESIDUAL = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
CODEBOOK = "quantize.embedding.weight"
PUBLISHED_CODES = 8192


@dataclass(frozen=True)
class FirstStageArchitecture:
    """What the shapes tell.

    Attributes:
        image_channels: of the image.
        latent_channels: of the latent, before ``post_quant_conv``'s inverse.
        channels: of each level, from the image inwards.
        layers: residual blocks a level of the encoder.
        attention: whether each level has attention.
        middle_attention: whether the middle has attention.
        codebook: number and width of the codes; None for a Gaussian latent.
    """

    image_channels: int
    latent_channels: int
    channels: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    middle_attention: bool
    codebook: tuple[int, int] | None

    @property
    def factor(self) -> int:
        """Image side over latent side."""
        return 2 ** (len(self.channels) - 1)


def read_architecture(shapes: Shapes) -> FirstStageArchitecture:
    """The architecture from the shapes of a first stage (names without ``first_stage_model.``).

    Raises:
        PriorError: it has no encoder.
    """
    widths: dict[int, list[int]] = {}
    blocks: dict[int, set[int]] = {}
    for name, shape in shapes.items():
        if found := BLOCK.fullmatch(name):
            widths.setdefault(int(found[1]), []).extend(shape[:1])
            blocks.setdefault(int(found[1]), set()).add(int(found[2]))
    levels = range(len(widths))
    if not widths or set(widths) != set(levels):
        raise PriorError(
            "its first stage (encoder.down.*) is missing or has gaps; a whole latent diffusion checkpoint is needed"
        )
    latent = _latent_channels(shapes)
    return FirstStageArchitecture(
        image_channels=vote(sizes(shapes, ["encoder.conv_in.weight"], 1), IMAGE_CHANNELS),
        latent_channels=latent,
        channels=tuple(vote(widths[i], GROUPS) for i in levels),
        layers=vote(len(blocks[i]) for i in levels),
        attention=tuple(any(name.startswith(f"encoder.down.{i}.attn.") for name in shapes) for i in levels),
        middle_attention=any(name.startswith("encoder.mid.attn_1.") for name in shapes),
        codebook=_codebook(shapes, latent),
    )


def _latent_channels(shapes: Shapes) -> int:
    columns = sizes(shapes, ["decoder.conv_in.weight"], 1)
    return vote(columns + sizes(shapes, ["post_quant_conv.weight", "post_quant_conv.bias"], 0), default=3)


def _codebook(shapes: Shapes, latent: int) -> tuple[int, int] | None:
    """A Gaussian latent doubles the channels of the encoder's last convolutions, a codebook does not."""
    ends = ("encoder.conv_out.weight", "encoder.conv_out.bias")
    doubled = [rows == 2 * latent for rows in sizes(shapes, ends, 0)]
    if CODEBOOK not in shapes and (vote(doubled) or not doubled):
        return None
    widths = sizes(shapes, ["quant_conv.weight", "quant_conv.bias"], 0) + sizes(shapes, [CODEBOOK], 1)
    return vote(sizes(shapes, [CODEBOOK], 0), PUBLISHED_CODES), vote(widths, latent)


def build_network(architecture: FirstStageArchitecture, image_size: int, scale: float) -> nn.Module:
    """The diffusers network without storage (on the meta device).

    Raises:
        PriorError: its channels do not fit the normalisation.
    """
    if any(width % GROUPS for width in architecture.channels):
        raise PriorError(f"the first stage's channels {architecture.channels} are no multiples of {GROUPS}, its groups")
    down = tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in architecture.attention)
    up = tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(architecture.attention))
    config = {
        "in_channels": architecture.image_channels,
        "out_channels": architecture.image_channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": architecture.channels,
        "layers_per_block": architecture.layers,
        "latent_channels": architecture.latent_channels,
        "norm_num_groups": GROUPS,
        "sample_size": image_size,
        "scaling_factor": scale,
        "mid_block_add_attention": architecture.middle_attention,
    }
    with torch.device("meta"):
        if architecture.codebook is None:
            return AutoencoderKL(**config)
        codes, width = architecture.codebook
        return VQModel(**config, num_vq_embeddings=codes, vq_embed_dim=width)


def map_first_stage(architecture: FirstStageArchitecture, network: nn.Module) -> list[Entry]:
    """Every tensor of the original first stage and what it becomes in ``network``."""
    shapes = shapes_of(network.state_dict())
    entries = [same(CODEBOOK, CODEBOOK, shapes)] if CODEBOOK in shapes else []
    for name in ("quant_conv", "post_quant_conv"):
        entries += _rename({"": ""}, name, name, shapes)
    for half in ("encoder", "decoder"):
        for name, new in {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}.items():
            entries += _rename({"": ""}, f"{half}.{name}", f"{half}.{new}", shapes)
        for i in (0, 1):
            entries += _rename(RESIDUAL, f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}", shapes)
        entries += _rename(ATTENTION, f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", shapes)
        entries += _level_entries(half, architecture, shapes)
    return covers(entries, shapes)


def _level_entries(half: str, architecture: FirstStageArchitecture, shapes: Shapes) -> list[Entry]:
    levels, entries = len(architecture.channels), []
    side, resample = ("down", "downsample") if half == "encoder" else ("up", "upsample")
    for level in range(levels):
        source = f"{half}.{side}.{level}"
        target = f"{half}.{side}_blocks.{level if side == 'down' else levels - 1 - level}"
        for block in range(architecture.layers + (side == "up")):
            entries += _rename(RESIDUAL, f"{source}.block.{block}", f"{target}.resnets.{block}", shapes)
            entries += _rename(ATTENTION, f"{source}.attn.{block}", f"{target}.attentions.{block}", shapes)
        entries += _rename({"conv": "conv"}, f"{source}.{resample}", f"{target}.{resample}rs.0", shapes)
    return entries


def _rename(names: dict[str, str], source: str, target: str, shapes: Shapes) -> list[Entry]:
    """Entries of a module's layers; those that the network lacks are left out."""
    entries = []
    for old, new in names.items():
        for leaf in ("weight", "bias"):
            a, b = (".".join(filter(None, parts)) for parts in ((source, old, leaf), (target, new, leaf)))
            if b in shapes:
                entries.append(pointwise(a, b, shapes, 2) if ".to_" in b else same(a, b, shapes))
    return entries
