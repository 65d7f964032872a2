"""The U-Net of guided diffusion and latent diffusion: its architecture read from the weights, and its names.

Both projects share one network (Dhariwal, Nichol 2021; Rombach et al. 2022): ``input_blocks``, ``middle_block`` and
``output_blocks`` are flat lists in which a level is ``num_res_blocks`` residual blocks, each followed by an attention
where the level has one, and a resampling step. Shapes tell everything but the width of an attention head.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from particledaps.priors.conversion.mapping import Shapes, sizes
from particledaps.priors.errors import PriorError

LAYER = re.compile(r"((?:input|output)_blocks\.\d+\.\d+|middle_block\.\d+)\.(.+)")
GROUPS = 32
IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class UNetArchitecture:
    """What the shapes tell.

    Attributes:
        in_channels: of the noisy input.
        out_channels: of the output as stored; twice ``in_channels`` with a learned variance.
        channels: of each level.
        res_blocks: residual blocks a level on the way down.
        attention: whether each level has attention.
        resblock_updown: residual blocks resample, instead of convolutions.
        scale_shift: the time embedding scales and shifts, instead of only shifting.
        context_dim: width of the cross attention's context; None for plain self-attention.
        classes: rows of the label embedding that is added to the time embedding, or None.
        depth: transformer blocks an attention layer.
        linear: a transformer's projections are linear layers, instead of 1x1 convolutions.
    """

    in_channels: int
    out_channels: int
    channels: tuple[int, ...]
    res_blocks: int
    attention: tuple[bool, ...]
    resblock_updown: bool
    scale_shift: bool
    context_dim: int | None
    classes: int | None = None
    depth: int = 1
    linear: bool = False

    @property
    def learned_sigma(self) -> bool:
        """The output carries a variance beside the noise."""
        return self.out_channels == 2 * self.in_channels


def vote(values: Iterable[Any], default: Any = None) -> Any:
    """The most frequent value: one missing or misshapen tensor must not mislead the others."""
    counts = Counter(values)
    return counts.most_common(1)[0][0] if counts else default


def read_architecture(shapes: Shapes) -> UNetArchitecture:
    """The architecture of a U-Net from the shapes of its tensors.

    Raises:
        PriorError: the blocks do not form levels.
    """
    layers: dict[str, Shapes] = defaultdict(dict)
    for name, shape in shapes.items():
        if found := LAYER.fullmatch(name):
            layers[found[1]][found[2]] = shape
    num_outputs = 0
    while _kind(layers.get(f"output_blocks.{num_outputs}.0")) == "residual":
        num_outputs += 1
    later = [_kind(layers.get(f"output_blocks.{i}.{j}")) for i in range(num_outputs) for j in (1, 2)]
    ups = [kind for kind in later if kind in ("residual", "conv")]
    levels = len(ups) + 1
    res_blocks = num_outputs // levels - 1
    if num_outputs % levels or res_blocks < 1:
        raise PriorError(
            f"its {num_outputs} output_blocks with {len(ups)} up-samplings form no levels of a U-Net"
            " (guided diffusion's classifiers have none and cannot be used)"
        )
    blocks = [_level_blocks(level, levels, res_blocks) for level in range(levels)]
    in_channels, out_channels = _outer_channels(shapes)
    return UNetArchitecture(
        in_channels=in_channels,
        out_channels=out_channels,
        channels=tuple(vote(_widths(layers, names), GROUPS) for names in blocks),
        res_blocks=res_blocks,
        attention=tuple(any(_kind(layers.get(_after(n))) == "attention" for n in names) for names in blocks),
        resblock_updown=vote(ups) == "residual",
        scale_shift=bool(vote(_scale_shifts(layers))),
        classes=vote(sizes(shapes, ["label_emb.weight"], 0)),
        **_transformer(layers),
    )


def _outer_channels(shapes: Shapes) -> tuple[int, int]:
    """Input and output channels; where one tensor disagrees, the two that fit each other count."""
    inputs = vote(sizes(shapes, ["input_blocks.0.0.weight"], 1))
    outputs = sizes(shapes, ["out.2.weight", "out.2.bias"], 0)
    fitting = [rows for rows in outputs if inputs and rows in (inputs, 2 * inputs)]
    if fitting:
        return inputs, vote(fitting)
    rows = vote(outputs, default=inputs or IMAGE_CHANNELS)
    return (IMAGE_CHANNELS if rows == 2 * IMAGE_CHANNELS else rows), rows


def _level_blocks(level: int, levels: int, res_blocks: int) -> list[str]:
    first = 1 + level * (res_blocks + 1)
    up = (levels - 1 - level) * (res_blocks + 1)
    inputs = [f"input_blocks.{first + i}.0" for i in range(res_blocks)]
    return inputs + [f"output_blocks.{up + i}.0" for i in range(res_blocks + 1)]


def _after(block: str) -> str:
    return block[:-1] + "1"


def _kind(layer: Shapes | None) -> str:
    names = {name.split(".")[0] for name in layer or {}}
    if names & {"in_layers", "out_layers", "emb_layers"}:
        return "residual"
    if names & {"qkv", "proj_out", "norm"}:
        return "attention"
    return "conv" if names & {"conv", "op"} else "other"


def _widths(layers: dict[str, Shapes], names: list[str]) -> list[int]:
    leaves = [f"{n}.{leaf}" for n in ("in_layers.2", "out_layers.0", "out_layers.3") for leaf in ("weight", "bias")]
    return [width for name in names for width in sizes(layers.get(name, {}), leaves, 0)]


def _scale_shifts(layers: dict[str, Shapes]) -> list[bool]:
    found = []
    for layer in layers.values():
        rows, width = (sizes(layer, [name], 0) for name in ("emb_layers.1.bias", "out_layers.0.weight"))
        found += [rows[0] == 2 * width[0]] if rows and width else []
    return found


def _transformer(layers: dict[str, Shapes]) -> dict[str, Any]:
    contexts = []
    depths = []
    projections = []
    for layer in layers.values():
        inner = [int(found[1]) for key in layer if (found := re.match(r"transformer_blocks\.(\d+)\.", key))]
        depths += [1 + max(inner)] if inner else []
        contexts += sizes(layer, [key for key in layer if re.search(r"attn2\.to_[kv]\.weight", key)], 1)
        projections += [len(shape) == 2 for key, shape in layer.items() if re.match(r"proj_(in|out)\.weight", key)]
    if not contexts:
        return {"context_dim": None}
    return {"context_dim": vote(contexts), "depth": vote(depths), "linear": bool(vote(projections))}
