"""Phase retrieval from oversampled Fourier magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from particledaps.operators.operator import CLEAR, IDENTITY, Halves, NoiseFloor, Objective, Operator, Symmetry


class HalfPlane(NamedTuple):
    """A centrosymmetric measurement without its redundancy, in ``rfft2`` layout.

    Attributes:
        mean: ``(B, C, H, W // 2 + 1)`` mean of each conjugate pair.
        weight: how many entries of the full plane each one stands for; ``(W // 2 + 1,)``, the same in every row, or
            ``(C, H, W // 2 + 1)``.
        pair_loss: ``(B,)`` ``1/2 sum over pairs (y1 - y2)^2``, the part of the loss that no image can change.
    """

    mean: torch.Tensor
    weight: torch.Tensor
    pair_loss: torch.Tensor


def rotate_180(x: torch.Tensor) -> torch.Tensor:
    """Rotate every channel of ``(B, C, H, W)`` by 180 degrees."""
    return x.flip((-2, -1))


def mirror_frequencies(plane: torch.Tensor) -> torch.Tensor:
    """The entry at ``-k`` in the place of ``k``, for a plane ``(..., H, W)`` with frequency 0 in its corner."""
    return plane.flip((-2, -1)).roll((1, 1), dims=(-2, -1))


def count_entries(y: torch.Tensor) -> tuple[int, int]:
    """Conjugate pairs and self-conjugate entries of one measurement ``(C, H, W)`` in the batch ``y``."""
    channels, height, width = y.shape[1:]
    self_conjugate = channels * (2 - height % 2) * (2 - width % 2)
    return (channels * height * width - self_conjugate) // 2, self_conjugate


class PhaseRetrieval(Operator):
    r"""Magnitude of the centred orthonormal Fourier transform of the zero-padded image, per channel.

    .. math:: A(x) = \left| F P \left(\tfrac{x + 1}{2}\right) \right|, \qquad
        L(x, y) = \sum (A(x) - y)^2

    ``P`` pads ``int(oversample / 8 * side)`` zeros on each side (DAPS: oversample 2 is 1.5 times the side). The image
    is real, so ``A(x)`` is centrosymmetric and conjugate entries of ``y`` are two independent readings of one number:

    .. math:: L = \sum_{half} w (a - \bar y)^2 + \tfrac12 \sum_{pairs} (y_1 - y_2)^2

    with w = 2 for pairs and 1 for self-conjugate entries. The gradient is
    ``crop(irfft2((a - ybar) X / |X|))``: the 1/2 of the range map cancels the 2 of the square.

    Args:
        oversample: padding, in eighths of the side for each side of the image.
        noise_sigma: standard deviation of the noise on the magnitudes (range of images: [0, 1]).

    Example:
        >>> operator = PhaseRetrieval(oversample=2.0)
        >>> x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)
        >>> operator(x).shape  # 12 = 1.5 * 8
        torch.Size([1, 1, 12, 12])
        >>> torch.allclose(operator(x), operator(x.flip(-1, -2)))  # the twin is not told apart
        True
    """

    name = "phase_retrieval"

    def __init__(self, oversample: float = 2.0, noise_sigma: float = 0.05) -> None:
        if not oversample > 0:
            raise ValueError(f"oversample={oversample}: must be positive")
        if not noise_sigma > 0:
            raise ValueError(f"noise_sigma={noise_sigma}: must be positive")
        self.oversample, self.noise_sigma = float(oversample), float(noise_sigma)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.fft2(self._pad(x / 2 + 0.5), norm="ortho")
        return torch.fft.fftshift(spectrum, dim=(-2, -1)).abs()

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        channels, height, width = image_shape
        return channels, height + 2 * self._margin(height), width + 2 * self._margin(width)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        half = self.half_plane(y)
        amplitude = self.spectrum(x).abs()
        return self._loss(amplitude - half.mean, half)

    def objective(self, y: torch.Tensor) -> Objective:
        half, share = self.half_plane(y), self.pair_share(y)
        size = y.shape[-2:]

        def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            spectrum = self.spectrum(x)
            amplitude = spectrum.abs()
            residual = amplitude - half.mean
            direction = spectrum * (share * residual / amplitude.clamp(min=1e-12))
            gradient = self.back_projection(direction, size, x.shape)
            return self._loss(residual, half), gradient

        return evaluate

    def high_snr_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        r"""Over the conjugate pairs whose mean, of noise :math:`\sigma / \sqrt 2`, stands clear of it."""
        half = self.half_plane(y)
        clear = half.mean > CLEAR * self.noise_sigma / 2**0.5
        amplitude = self.spectrum(x).abs()
        return (half.weight * clear * (amplitude - half.mean).square()).flatten(1).sum(1)

    def spectrum(self, x: torch.Tensor) -> torch.Tensor:
        """Orthonormal transform of the padded image in [0, 1], in ``rfft2`` layout; its magnitudes are measured."""
        return torch.fft.rfft2(self._pad(x / 2 + 0.5), norm="ortho")

    def back_projection(self, spectrum: torch.Tensor, size: Sequence[int], shape: torch.Size) -> torch.Tensor:
        """Adjoint of the transform: the image in [0, 1] on the support, from a half plane of ``size`` ``(H, W)``."""
        return self._crop(torch.fft.irfft2(spectrum, s=tuple(size), norm="ortho"), shape)

    def pair_share(self, y: torch.Tensor) -> torch.Tensor:
        """Share of each pair of entries that was measured, in ``rfft2`` layout; here all of them, ``()``."""
        return y.new_ones(())

    def half_plane(self, y: torch.Tensor) -> HalfPlane:
        """Average conjugate pairs of the centred full plane ``y``."""
        plane = torch.fft.ifftshift(y, dim=(-2, -1))
        mean = (plane + mirror_frequencies(plane)) / 2
        weight = self.column_weight(y)
        pair_loss = (plane - mean).square().flatten(1).sum(1)
        return HalfPlane(mean[..., : len(weight)], weight, pair_loss)

    @staticmethod
    def column_weight(y: torch.Tensor) -> torch.Tensor:
        """``(W // 2 + 1,)`` how many entries of the full plane each column of the half plane stands for."""
        width = y.shape[-1]
        weight = y.new_full((width // 2 + 1,), 2.0)
        weight[0] = 1.0
        if width % 2 == 0:
            weight[-1] = 1.0
        return weight

    def noise_floor(self, y: torch.Tensor) -> NoiseFloor:
        r""":math:`\sigma^2 n_{half} + \tfrac12 \sum_{pairs} (y_1 - y_2)^2 \pm \sigma^2 \sqrt{2 n_{half}}`."""
        pairs, self_conjugate = count_entries(y)
        independent, variance = pairs + self_conjugate, self.noise_sigma**2
        mean = self.half_plane(y).pair_loss + variance * independent
        return NoiseFloor(mean, torch.full_like(mean, variance * (2 * independent) ** 0.5))

    def estimated_noise_sigma(self, y: torch.Tensor) -> torch.Tensor | None:
        """Noise level that the conjugate pairs reveal, ``(B,)``: ``mean((y1 - y2)^2) / 2`` is its square."""
        return (self.half_plane(y).pair_loss / count_entries(y)[0]).sqrt()

    def split(self, y: torch.Tensor) -> Halves:
        """The first and the second entry of each conjugate pair, mirrored; self-conjugate entries are in both."""
        height, width = y.shape[-2:]
        index = torch.arange(height * width, device=y.device).reshape(height, width)
        conjugate = mirror_frequencies(index)
        flat = torch.fft.ifftshift(y, dim=(-2, -1)).flatten(-2)
        first, second = flat[..., torch.minimum(index, conjugate)], flat[..., torch.maximum(index, conjugate)]
        pairs, self_conjugate = count_entries(y)
        floor = y.new_full((len(y),), self.noise_sigma**2 * (2 * pairs + self_conjugate))
        fit, held = (torch.fft.fftshift(copy, dim=(-2, -1)) for copy in (first, second))
        return Halves(fit, held, floor)

    def symmetries(self) -> tuple[Symmetry, ...]:
        """Identity and the 180-degree rotation, the two answers that look like photographs."""
        return IDENTITY, Symmetry("rotate_180", rotate_180)

    def channel_symmetries(self, channels: int) -> tuple[Symmetry, ...]:
        """Every combination of rotated channels, ``2 ** channels`` of them, the identity first."""

        def combination(code: int) -> Symmetry:
            rotated = [c for c in range(channels) if code >> c & 1]

            def apply(x: torch.Tensor) -> torch.Tensor:
                result = x.clone()
                result[:, rotated] = rotate_180(x[:, rotated])
                return result

            return Symmetry("rotate_channels_" + "".join(map(str, rotated)), apply) if rotated else IDENTITY

        return tuple(combination(code) for code in range(2**channels))

    def _margin(self, side: int) -> int:
        return int(self.oversample / 8 * side)

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        rows, columns = self._margin(x.shape[-2]), self._margin(x.shape[-1])
        return torch.nn.functional.pad(x, (columns, columns, rows, rows))

    def _crop(self, plane: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        rows, columns = self._margin(shape[-2]), self._margin(shape[-1])
        return plane[..., rows : rows + shape[-2], columns : columns + shape[-1]]

    @staticmethod
    def _loss(residual: torch.Tensor, half: HalfPlane) -> torch.Tensor:
        return (half.weight * residual.square()).flatten(1).sum(1) + half.pair_loss
