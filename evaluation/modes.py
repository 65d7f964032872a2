r"""Which twin is a reconstruction?

With :math:`x_{odd} = (x - g x) / 2` and :math:`x_{even}` the mean-free part of :math:`(x + g x) / 2` under the
rotation g by 180 degrees, :math:`c_{odd}, c_{even}` are the projections of the estimate's parts on the truth's.
"""

from dataclasses import dataclass

import torch

from evaluation.metrics import psnr_db
from operators.phase_retrieval import rotate_180

ODD_THRESHOLD = 0.7
EVEN_THRESHOLD = 0.7
SOLVED_DB = 18.0
SOLVED_MARGIN_DB = 2.0
THRESHOLDS = {
    "odd": ODD_THRESHOLD,
    "even": EVEN_THRESHOLD,
    "solved_db": SOLVED_DB,
    "solved_above_twin_average_db": SOLVED_MARGIN_DB,
}


@dataclass(frozen=True)
class Modes:
    """Labels of P reconstructions of one truth.

    Attributes:
        labels: ``0`` upright, ``180`` rotated, ``mixed`` (both twins superposed) or ``none``.
        twin_fit: ``(a, b)`` of the fit ``x ~ a x* + b g(x*)``, each.
        solved: upright or rotated, and good enough.
        coverage: number of distinct solved labels.
    """

    labels: list[str]
    twin_fit: list[tuple[float, float]]
    solved: list[bool]
    coverage: int


def _parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    odd, even = (x - rotate_180(x)) / 2, (x + rotate_180(x)) / 2
    return odd.flatten(1), (even - even.mean((-2, -1), keepdim=True)).flatten(1)


def _projection(x: torch.Tensor, onto: torch.Tensor) -> torch.Tensor:
    return (x * onto).sum(1) / onto.square().sum(1).clamp(min=1e-12)


def label(c_odd: float, c_even: float) -> str:
    """Mode label of one reconstruction from its two projections."""
    if abs(c_odd) > ODD_THRESHOLD:
        return "0" if c_odd > 0 else "180"
    return "mixed" if c_even > EVEN_THRESHOLD else "none"


def find_modes(x: torch.Tensor, truth: torch.Tensor, aligned_psnr_db: list[float]) -> Modes:
    """Label ``x`` ``(P, C, H, W)`` against ``truth`` ``(1, C, H, W)``.

    Solved means label ``0`` or ``180`` and an aligned PSNR of at least ``min(twin average + 2, 18)`` dB, where "twin
    average" is the PSNR of the superposition of both twins.
    """
    odd, even = _parts(x.double())
    odd_truth, even_truth = _parts(truth.double())
    c_odd, c_even = _projection(odd, odd_truth).tolist(), _projection(even, even_truth).tolist()
    labels = [label(o, e) for o, e in zip(c_odd, c_even, strict=True)]
    twin_average = psnr_db((truth + rotate_180(truth)) / 2, truth).item()
    needed = min(twin_average + SOLVED_MARGIN_DB, SOLVED_DB)
    solved = [n in ("0", "180") and q >= needed for n, q in zip(labels, aligned_psnr_db, strict=True)]
    fit = [((e + o) / 2, (e - o) / 2) for o, e in zip(c_odd, c_even, strict=True)]
    return Modes(labels, fit, solved, len({n for n, s in zip(labels, solved, strict=True) if s}))
