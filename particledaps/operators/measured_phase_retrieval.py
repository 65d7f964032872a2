"""Phase retrieval from a part of the plane: dead lines, a beam stop, a corner that no detector covered."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from particledaps.operators.operator import CLEAR, Halves, NoiseFloor
from particledaps.operators.phase_retrieval import HalfPlane, PhaseRetrieval, mirror_frequencies


class Readings(NamedTuple):
    """Which entries of the plane were measured, frequency 0 in the corner.

    Attributes:
        seen: ``(C, H, W)`` bool.
        times: ``(C, H, W)`` how often the pair of each entry was measured, 0 to 2; self-conjugate ones 0 or 2.
        share: ``(C, H, W // 2 + 1)`` half of it: the share of the pair's weight that is left.
    """

    seen: torch.Tensor
    times: torch.Tensor
    share: torch.Tensor


class MeasuredPhaseRetrieval(PhaseRetrieval):
    r"""Phase retrieval whose loss is the sum over the measured entries ``m`` of the full plane.

    .. math:: L = \sum m (a - y)^2 = \sum_{half} w (a - \bar y)^2 + \tfrac12 \sum_{both} (y_1 - y_2)^2

    with :math:`\bar y` the mean of the measured entries of a pair and w their number; the second sum runs over pairs of
    which both were measured. A pair of which one entry is dead loses half of its weight, not its place.

    Args:
        operator: what measured.
        measured: ``(C, H, W)`` of the centred plane, True where an entry was measured.

    Raises:
        ValueError: nothing was measured.
    """

    def __init__(self, operator: PhaseRetrieval, measured: torch.Tensor) -> None:
        super().__init__(operator.oversample, operator.noise_sigma)
        self.measured = measured.bool()
        if not self.measured.any():
            raise ValueError(f"{self.name}: no entry of the measurement was measured")
        seen = torch.fft.ifftshift(self.measured, dim=(-2, -1))
        index = torch.arange(seen[0].numel()).reshape(seen.shape[-2:])
        alone = int((seen & (index == mirror_frequencies(index)).to(seen.device)).sum())
        both, either = seen & mirror_frequencies(seen), seen | mirror_frequencies(seen)
        self.pairs = (int(both.sum()) - alone) // 2
        """Pairs of which both entries were measured."""
        self.independent = (int(either.sum()) + alone) // 2
        """Numbers of the half plane of which anything was measured."""
        self._readings = cache(self._readings_on)

    def _readings_on(self, dtype: torch.dtype, device: torch.device) -> Readings:
        seen = torch.fft.ifftshift(self.measured, dim=(-2, -1)).to(device)
        count = seen.to(dtype) + mirror_frequencies(seen).to(dtype)
        return Readings(seen, count, count[..., : seen.shape[-1] // 2 + 1] / 2)

    def fill(self, y: torch.Tensor) -> torch.Tensor:
        """``y`` ``(..., C, H, W)`` with the conjugate entry in each gap, or 0 where that was not measured either."""
        plane = torch.fft.ifftshift(torch.where(self.measured.to(y.device), y, 0), dim=(-2, -1))
        seen = self._readings(y.dtype, y.device).seen
        return torch.fft.fftshift(torch.where(seen, plane, mirror_frequencies(plane)), dim=(-2, -1))

    def high_snr_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        r"""Over the pairs whose mean stands clear of its noise: :math:`\sigma / \sqrt 2`, of a single entry sigma."""
        half, share = self.half_plane(y), self._readings(y.dtype, y.device).share
        clear = half.mean * (2 * share).clamp(min=1).sqrt() > CLEAR * self.noise_sigma
        amplitude = self.spectrum(x).abs()
        return (half.weight * clear * (amplitude - half.mean).square()).flatten(1).sum(1)

    def pair_share(self, y: torch.Tensor) -> torch.Tensor:
        """``(C, H, W // 2 + 1)``: 0 where neither entry of a pair was measured, 1/2 where one was."""
        return self._readings(y.dtype, y.device).share

    def half_plane(self, y: torch.Tensor) -> HalfPlane:
        """Average the measured entries of each conjugate pair; the weight ``(C, H, W // 2 + 1)`` is their number."""
        readings = self._readings(y.dtype, y.device)
        plane = torch.where(readings.seen, torch.fft.ifftshift(y, dim=(-2, -1)), 0)
        mean = (plane + mirror_frequencies(plane)) / readings.times.clamp(min=1)
        pair_loss = torch.where(readings.seen, plane - mean, 0).square().flatten(1).sum(1)
        weight = self.column_weight(y) * readings.share
        return HalfPlane(mean[..., : weight.shape[-1]], weight, pair_loss)

    def noise_floor(self, y: torch.Tensor) -> NoiseFloor:
        r""":math:`\sigma^2 n_{half} + \tfrac12 \sum_{both} (y_1 - y_2)^2 \pm \sigma^2 \sqrt{2 n_{half}}`.

        :math:`n_{half}` counts the numbers of the half plane of which anything was measured.
        """
        variance = self.noise_sigma**2
        mean = self.half_plane(y).pair_loss + variance * self.independent
        return NoiseFloor(mean, torch.full_like(mean, variance * (2 * self.independent) ** 0.5))

    def estimated_noise_sigma(self, y: torch.Tensor) -> torch.Tensor | None:
        """Noise level that the pairs reveal of which both entries were measured, ``(B,)``; None if there is none."""
        return (self.half_plane(y).pair_loss / self.pairs).sqrt() if self.can_split else None

    @property
    def can_split(self) -> bool:
        """Was any pair measured twice?"""
        return self.pairs > 0

    def split(self, y: torch.Tensor) -> Halves:
        """The first and the second entry of each pair, mirrored; what was measured once is in both.

        Where no pair was measured twice, the copies are equal and their noise is the same.
        """
        fit, held, _ = super().split(self.fill(y))
        floor = y.new_full((len(y),), self.noise_sigma**2 * int(self.measured.sum()))
        return Halves(fit, held, floor)
