"""Pictures of a run: contact sheet, trajectory, single images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

from particledaps.files import replacing

if TYPE_CHECKING:  # imported where something is drawn
    from matplotlib.axes import Axes


GAP_COLOUR = (0.7, -0.7, -0.7)
"""Red, in [-1, 1], for what was not measured."""


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """``(C, H, W)`` in [-1, 1] -> ``(H, W, C)`` uint8, rounded."""
    values = (x.detach().float().cpu() / 2 + 0.5).clamp(0, 1) * 255
    return values.round().byte().permute(1, 2, 0).numpy()


def save_png(path: Path, x: torch.Tensor) -> None:
    """Write one image ``(C, H, W)`` in [-1, 1]."""
    pixels = to_uint8(x)
    with replacing(path, durable=False) as temporary:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(temporary)


def show(axis: Axes, x: torch.Tensor, title: str, colour: str = "black") -> None:
    """One tile of a figure."""
    pixels = to_uint8(x)
    axis.imshow(pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap="gray", interpolation="nearest")
    axis.set_title(title, fontsize=8, color=colour, parse_math=False)
    axis.axis("off")


def measurement_picture(y: torch.Tensor, picture: torch.Tensor | None = None) -> torch.Tensor:
    """A measurement for display: its ``picture`` where it is a grey or colour image, else the scaled log magnitude.

    A pixel that was measured in no channel is red; one that was in some shows their mean.

    Args:
        y: ``(C, H, W)``, NaN where not measured; other shapes are flattened to a row.
        picture: what the operator takes it for, see :meth:`particledaps.operators.operator.Operator.picture`.
    """
    if picture is not None and picture.ndim == 3 and picture.shape[0] in (1, 3):
        return _with_red_gaps(picture)
    plane = y if y.ndim == 3 else y.reshape(1, 1, -1)
    values = torch.log10(plane.abs().nanmean(0, keepdim=True) + 1e-2)
    low, high = values[~values.isnan()].aminmax()
    return _with_red_gaps((values - low) / (high - low).clamp(min=1e-12) * 2 - 1)


def _with_red_gaps(picture: torch.Tensor) -> torch.Tensor:
    """A picture ``(C, H, W)`` itself if it is finite, else ``(3, H, W)`` with its NaN filled or red."""
    gaps = picture.isnan()
    if not gaps.any():
        return picture
    filled = torch.where(gaps, picture.nanmean(0, keepdim=True), picture).expand(3, *picture.shape[1:])
    red = picture.new_tensor(GAP_COLOUR)[:, None, None]
    return torch.where(gaps.all(0), red, filled)


def contact_sheet(path: Path, rows: Sequence[Sequence[tuple[torch.Tensor, str, bool]]], heading: str) -> None:
    """Tiles of ``(image, title, emphasised)`` in rows, to a PNG."""
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.75 * columns, 2.05 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for axis_row, row in zip(axes, rows, strict=True):
        for axis in axis_row[len(row) :]:
            axis.axis("off")
        for axis, (image, title, emphasised) in zip(axis_row, row, strict=False):
            show(axis, image, title, "tab:green" if emphasised else "black")
    figure.suptitle(heading, fontsize=9, parse_math=False)
    with replacing(path, durable=False) as temporary:
        figure.savefig(temporary, dpi=110)


class Snapshot(NamedTuple):
    """Clean estimates at one level.

    Attributes:
        step: the level.
        sigma: its noise level.
        ids: particle ids.
        before: ``(P, ...)`` estimates of the ODE.
        after: ``(P, ...)`` estimates after MCMC.
    """

    step: int
    sigma: float
    ids: list[int]
    before: torch.Tensor
    after: torch.Tensor


def trajectory_figure(path: Path, snapshots: Sequence[Snapshot], moves: Mapping[tuple[int, int], str]) -> None:
    """``z0_hat`` (ODE) above ``z0_y`` (after MCMC) over sigma, two rows a particle; gaps where one did not exist.

    Args:
        path: the PNG.
        snapshots: of the levels.
        moves: names of the moves that were accepted at the end of a level, by step and particle id; marked.
    """
    columns = sorted({(s.step, s.sigma) for s in snapshots})
    found = {(s.step, i): (s.before[p], s.after[p]) for s in snapshots for p, i in enumerate(s.ids)}
    ids = sorted({i for s in snapshots for i in s.ids})
    blank = torch.ones_like(snapshots[0].before[0])
    rows = []
    for particle in ids:
        pairs = [found.get((step, particle), (blank, blank)) for step, _ in columns]
        titles = [f"sigma {sigma:.3g}" for _, sigma in columns]
        before = [(pair[0], title, False) for pair, title in zip(pairs, titles, strict=True)]
        made = [moves.get((step, particle), "") for step, _ in columns]
        after = [(pair[1], move, bool(move)) for pair, move in zip(pairs, made, strict=True)]
        rows += [
            [(before[0][0], f"particle {particle}\nODE, {titles[0]}", False), *before[1:]],
            [(after[0][0], "\n".join(["end of level", *filter(None, made[:1])]), after[0][2]), *after[1:]],
        ]
    contact_sheet(path, rows, "clean estimates over the annealing: ODE (upper rows), end of the level (lower rows)")


def lineage_figure(path: Path, line: Sequence[tuple[torch.Tensor, str]], truth: torch.Tensor | None) -> None:
    """The answer's ancestors, the oldest first, and the answer as it came out, beside the truth.

    Args:
        path: the PNG.
        line: images ``(C, H, W)`` in [-1, 1] and their titles.
        truth: ``(1, C, H, W)``, or None.
    """
    tiles = [] if truth is None else [(truth[0], "truth", False)]
    tiles += [(image, title, position == len(line) - 1) for position, (image, title) in enumerate(line)]
    contact_sheet(path, [tiles], "the answer's line of descent, oldest first; last: the answer")
