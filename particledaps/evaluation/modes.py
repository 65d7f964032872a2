r"""Which twin is a reconstruction?

With :math:`x_{odd} = (x - g x) / 2` and :math:`x_{even}` the mean-free part of :math:`(x + g x) / 2` under the
rotation g by 180 degrees, :math:`c_{odd}, c_{even}` are the projections of the estimate's parts on the truth's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from particledaps.evaluation.metrics import psnr_db
from particledaps.evaluation.thresholds import (
    EVEN_THRESHOLD,
    ODD_THRESHOLD,
    SAME_TWINS_DB,
    SOLVABLE,
    SOLVED_DB,
    SOLVED_MARGIN_DB,
    WHOLE_THRESHOLD,
)
from particledaps.operators.phase_retrieval import rotate_180

if TYPE_CHECKING:
    from particledaps.operators.operator import Symmetry

ROTATION = "rotate_180"
"""Name of the symmetry that makes twins."""


@dataclass(frozen=True)
class Modes:
    """Labels of P reconstructions of one truth.

    Attributes:
        labels: ``0`` upright, ``180`` rotated, ``mixed`` (both twins superposed) or ``none``; ``symmetric`` where the
            truth is its own twin. Where the operator has no twins: ``0`` or ``none``.
        twin_fit: ``(a, b)`` of the fit ``x ~ a x* + b g(x*)``, each.
        channel_fit: the same fit of each channel alone, a list of C pairs each.
        solved: upright, rotated or symmetric, and good enough.
        coverage: number of distinct solved labels among the particles that count; None for a symmetric truth.
    """

    labels: list[str]
    twin_fit: list[tuple[float, float]]
    channel_fit: list[list[tuple[float, float]]]
    solved: list[bool]
    coverage: int | None


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Odd and mean-free even part under the rotation, like ``x``."""
    odd, even = (x - rotate_180(x)) / 2, (x + rotate_180(x)) / 2
    return odd, _mean_free(even)


def _mean_free(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean((-2, -1), keepdim=True)


def _projection(x: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    """Coefficient of ``x`` on ``onto``, over all axes but the first."""
    return (x * onto).flatten(1).sum(1) / onto.square().flatten(1).sum(1).clamp(min=1e-12)


def twin_projections(x: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    r""":math:`c_{odd}, c_{even}` of ``x`` ``(P, ...)`` on ``truth`` ``(1, ...)``, ``(P,)`` each.

    The least-squares fit ``x ~ a x* + b g(x*)`` of the mean-free images is ``a, b = (c_even +- c_odd) / 2``.
    """
    parts = zip(_parts(x.double()), _parts(truth.double()), strict=True)
    odd, even = (_projection(part, onto) for part, onto in parts)
    return odd, even


def label(c_odd: float, c_even: float) -> str:
    """Mode label of one reconstruction from its two projections."""
    if abs(c_odd) > ODD_THRESHOLD:
        return "0" if c_odd > 0 else "180"
    return "mixed" if c_even > EVEN_THRESHOLD else "none"


def is_own_twin(truth: torch.Tensor) -> bool:
    """Is an image ``(1, C, H, W)`` its own rotation, to :data:`SAME_TWINS_DB`?"""
    return psnr_db(rotate_180(truth), truth).item() >= SAME_TWINS_DB


def has_twins(symmetries: Sequence[Symmetry]) -> bool:
    """Do an operator's symmetries hold the rotation, so that an image and its twin have one measurement?"""
    return ROTATION in [s.name for s in symmetries]


def find_modes(
    x: torch.Tensor,
    truth: torch.Tensor,
    aligned_psnr_db: list[float],
    counts: Sequence[bool] | None = None,
    twins: bool = True,
) -> Modes:
    """Label ``x`` ``(P, C, H, W)`` against ``truth`` ``(1, C, H, W)``.

    Solved means one of the labels ``0``, ``180`` and ``symmetric`` and an aligned PSNR of at least ``min(twin average +
    2, 18)`` dB, where "twin average" is the PSNR of the superposition of both twins (18 dB where there are no two).

    Args:
        x: reconstructions.
        truth: what they should be.
        aligned_psnr_db: of each.
        counts: which particles enter the coverage, None: all. A twin that was made by turning its particle found no
            mode.
        twins: whether the operator takes an image and its rotation for the same, see :func:`has_twins`.
    """
    c_odd, c_even = (c.tolist() for c in twin_projections(x, truth))
    symmetric = twins and is_own_twin(truth)
    if symmetric:
        labels = ["symmetric"] * len(x)
    elif twins:
        labels = [label(o, e) for o, e in zip(c_odd, c_even, strict=True)]
    else:
        whole = _projection(*(_mean_free(image.double()) for image in (x, truth))).tolist()
        labels = ["0" if c > WHOLE_THRESHOLD else "none" for c in whole]
    needed = _needed_db(truth) if twins and not symmetric else SOLVED_DB
    solved = [n in SOLVABLE and q >= needed for n, q in zip(labels, aligned_psnr_db, strict=True)]
    channels = [twin_projections(x[:, c : c + 1], truth[:, c : c + 1]) for c in range(x.shape[1])]
    by_channel = [_fits(odd.tolist(), even.tolist()) for odd, even in channels]
    found = {n for n, s, c in zip(labels, solved, counts or [True] * len(x), strict=True) if s and c}
    coverage = None if symmetric else len(found)
    return Modes(labels, _fits(c_odd, c_even), [list(f) for f in zip(*by_channel, strict=True)], solved, coverage)


def _needed_db(truth: torch.Tensor) -> float:
    """Aligned PSNR that tells a twin from the superposition of both."""
    twin_average = psnr_db((truth + rotate_180(truth)) / 2, truth).item()
    return min(twin_average + SOLVED_MARGIN_DB, SOLVED_DB)


def _fits(c_odd: list[float], c_even: list[float]) -> list[tuple[float, float]]:
    return [((e + o) / 2, (e - o) / 2) for o, e in zip(c_odd, c_even, strict=True)]


def agreement_db(x: torch.Tensor, other: torch.Tensor, symmetries: Sequence[Symmetry]) -> torch.Tensor:
    """PSNR between image ``x`` ``(1, C, H, W)`` and each of ``other`` ``(P, C, H, W)``, turned by the best symmetry.

    With two independent reconstructions it needs no truth: where they agree they vouch for each other.
    """
    return torch.stack([psnr_db(symmetry.apply(other), x) for symmetry in symmetries]).amax(0)


def symmetry_index(x: torch.Tensor) -> torch.Tensor:
    r"""How far each image is from being its own twin, without the truth, ``(P,)`` in [0, inf).

    .. math:: |x_{odd}| / |x_{even}|

    Near 0 for a superposition of both twins in equal parts; a photograph has about 0.5 to 1.5.

    Args:
        x: ``(P, C, H, W)``.
    """
    odd, even = (part.flatten(1).norm(dim=1) for part in _parts(x.double()))
    return odd / even.clamp(min=1e-12)


def channel_agreement(x: torch.Tensor) -> torch.Tensor:
    r"""Do the channels agree on which twin they show? Without the truth, ``(P,)`` in [-1, 1].

    The correlation of each channel's odd part with that of the strongest channel, the lowest of them; 1 for one
    channel. A photograph's channels are alike (well above 0); one rotated channel gives a negative value.

    Args:
        x: ``(P, C, H, W)``.
    """
    odd = _parts(x.double())[0].flatten(2)
    strongest = odd.square().sum(2).argmax(1)
    reference = odd[torch.arange(len(odd)), strongest][:, None]
    norms = odd.norm(dim=2) * reference.norm(dim=2)
    return ((odd * reference).sum(2) / norms.clamp(min=1e-12)).amin(1)
