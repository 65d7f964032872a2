"""Image quality against the truth: PSNR, SSIM and LPIPS, raw and aligned over an operator's symmetries.

All metrics see images clipped to [0, 1] as floats, as DAPS evaluates (piq 0.8). LPIPS is piq's VGG16 variant with
average pooling (``replace_pooling=True``), which is not the number of the ``lpips`` package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from particledaps.evaluation.lpips import load_lpips, lpips_files
from particledaps.operators.operator import Symmetry

if TYPE_CHECKING:
    from piq import ContentLoss

__all__ = ["Evaluator", "Scores", "load_lpips", "lpips_files", "psnr_db", "ssim", "to_unit_range"]
LPIPS_VARIANT = "piq.LPIPS(replace_pooling=True)"


def to_unit_range(x: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> [0, 1], clipped."""
    return (x / 2 + 0.5).clamp(0, 1)


def psnr_db(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    r""":math:`-10 \log_{10}(mse + 10^{-8})` on [0, 1], ``(B,)``; inputs ``(B, C, H, W)`` in [-1, 1].

    Example:
        >>> x = torch.zeros(1, 3, 8, 8)
        >>> round(psnr_db(x + 0.2, x).item(), 2)  # wrong by 0.1 of the range
        20.0
    """
    mse = (to_unit_range(x) - to_unit_range(truth)).double().square().flatten(1).mean(1)
    return -10 * torch.log10(mse + 1e-8)


def ssim(x: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """SSIM (Wang et al. 2004; 11x11 Gaussian of 1.5, per channel), ``(B,)``; a smaller window below 11 px."""
    import piq

    side = min(x.shape[-2:])
    window = min(11, side - (side + 1) % 2)
    return piq.ssim(to_unit_range(x), to_unit_range(truth), window, data_range=1.0, reduction="none").double()


@dataclass(frozen=True)
class Scores:
    """Metrics of P images against one truth; every list has P entries.

    Attributes:
        raw: metric name -> values.
        aligned: metric name -> values after the symmetry that gives the best PSNR.
        by_symmetry: symmetry name -> metric name -> values.
        best_symmetry: name of the symmetry that ``aligned`` uses, per image.
        channel_aligned: metric name -> values after the combination of turned channels that gives the best PSNR;
            empty where the operator has none.
    """

    raw: dict[str, list[float]]
    aligned: dict[str, list[float]]
    by_symmetry: dict[str, dict[str, list[float]]]
    best_symmetry: list[str]
    channel_aligned: dict[str, list[float]] = field(default_factory=dict)


class Evaluator:
    """Scores reconstructions.

    Args:
        symmetries: the operator's natural ambiguities, the identity first.
        lpips: the LPIPS network, or None to leave LPIPS out.
        channel_symmetries: number of channels -> the ambiguities of single channels, the identity first, if there are
            any; see :meth:`particledaps.operators.operator.Operator.channel_symmetries`.
    """

    def __init__(
        self,
        symmetries: Sequence[Symmetry],
        lpips: ContentLoss | None = None,
        channel_symmetries: Callable[[int], Sequence[Symmetry]] = lambda channels: (),
    ) -> None:
        self.symmetries = tuple(symmetries)
        self.lpips = lpips
        self.channel_symmetries = channel_symmetries

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that are computed."""
        return ("psnr", "ssim") if self.lpips is None else ("psnr", "ssim", "lpips")

    def __call__(self, x: torch.Tensor, truth: torch.Tensor) -> Scores:
        """Score ``x`` ``(P, C, H, W)`` against ``truth`` ``(1, C, H, W)``; the alignment is chosen by PSNR."""
        expanded = truth.expand_as(x)
        by_symmetry = {s.name: self._all(s.apply(x), expanded) for s in self.symmetries}
        names = list(by_symmetry)
        psnrs = torch.tensor([by_symmetry[n]["psnr"] for n in names])
        best = [names[i] for i in psnrs.argmax(0).tolist()]
        aligned = {m: [by_symmetry[n][m][p] for p, n in enumerate(best)] for m in self.names}
        return Scores(by_symmetry[names[0]], aligned, by_symmetry, best, self._channel_aligned(x, expanded))

    def _channel_aligned(self, x: torch.Tensor, truth: torch.Tensor) -> dict[str, list[float]]:
        turned = [s.apply(x) for s in self.channel_symmetries(x.shape[1])]
        if not turned:
            return {}
        best = torch.stack([psnr_db(candidate, truth) for candidate in turned]).argmax(0)
        return self._all(torch.stack(turned)[best, torch.arange(len(x), device=x.device)], truth)

    def _all(self, x: torch.Tensor, truth: torch.Tensor) -> dict[str, list[float]]:
        values = {"psnr": psnr_db(x, truth), "ssim": ssim(x, truth)}
        if self.lpips is not None:
            with torch.no_grad():
                three = (len(x), 3, *x.shape[-2:])  # grey images repeat their channel
                values["lpips"] = self.lpips(*(to_unit_range(i).expand(three) for i in (x, truth))).flatten()
        return {name: value.tolist() for name, value in values.items()}
