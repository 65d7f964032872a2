r"""The covariance of a clean estimate :math:`p(z_0 | z_\sigma)`, band by band.

An estimate is right at low frequencies first, and its channels err together. So the covariance is taken to be
stationary: diagonal in the frequencies of the discrete cosine transform T (DCT-II, which does not wrap around the
edge), and in each band b of equal radius a matrix :math:`C_b` over the channels,

.. math:: \mathrm{Cov} = T^T \, \mathrm{blockdiag}_f (C_{b(f)}) \, T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

RIDGE = 1e-4
"""Share of a band's mean variance that is added to each of its channels: few draws leave directions empty."""
LEAST_VARIANCE = 1e-10


@cache
def dct_matrix(size: int) -> torch.Tensor:
    r"""Orthonormal DCT-II ``(size, size)`` in float64: row k is :math:`c_k \cos(\pi k (2 n + 1) / 2 N)`.

    Example:
        >>> t = dct_matrix(8)
        >>> torch.allclose(t @ t.T, torch.eye(8, dtype=torch.float64))
        True
    """
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = (math.pi * k * (2 * n + 1) / (2 * size)).cos() * (2 / size) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


@cache
def band_of(height: int, width: int) -> torch.Tensor:
    """The band of each frequency ``(H, W)``: its radius in half cycles along the longer side, rounded."""
    side = max(height, width)
    rows, columns = torch.arange(height) * (side / height), torch.arange(width) * (side / width)
    return torch.hypot(rows[:, None], columns).round().long().unique(return_inverse=True)[1]


def band_matrices(errors: torch.Tensor) -> torch.Tensor:
    """Second moments of ``errors`` ``(N, C, H, W)`` over the channels of each band, ``(bands, C, C)`` float64."""
    count, channels, height, width = errors.shape
    rows, columns = (dct_matrix(size).to(errors.device) for size in (height, width))
    coefficients = rows @ errors.double() @ columns.mT
    products = torch.einsum("nchw,ndhw->hwcd", coefficients, coefficients).reshape(-1, channels, channels) / count
    bands = band_of(height, width).flatten().to(errors.device)
    total = products.new_zeros(int(bands.max()) + 1, channels, channels).index_add(0, bands, products)
    return total / torch.bincount(bands)[:, None, None]


class WhiteCovariance:
    """One variance for every element: :class:`BandedCovariance` where the basis is that of the pixels.

    Args:
        variance: of every element.
    """

    def __init__(self, variance: float, like: torch.Tensor) -> None:
        self.variance = torch.full((), variance).to(like)

    def to_basis(self, x: torch.Tensor) -> torch.Tensor:
        """``x``."""
        return x

    def from_basis(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The coefficients."""
        return coefficients


class BandedCovariance:
    """A covariance in the basis in which it is diagonal: frequencies, and in each band the axes of the channels.

    Args:
        matrices: ``(bands, C, C)`` of each band of images ``(C, H, W)``, positive semi-definite.
        image_shape: ``(C, H, W)``.
        like: dtype and device to compute in.

    Attributes:
        variance: ``(C, H, W)`` along the axes of the basis.
    """

    def __init__(self, matrices: torch.Tensor, image_shape: tuple[int, int, int], like: torch.Tensor) -> None:
        channels, height, width = image_shape
        eye = torch.eye(channels, dtype=matrices.dtype, device=matrices.device)
        mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
        values, axes = torch.linalg.eigh(matrices + RIDGE * mean[:, None, None] * eye)
        bands = band_of(height, width).to(matrices.device)
        self.variance = values.clamp(min=LEAST_VARIANCE)[bands].permute(2, 0, 1).to(like)
        self._axes = axes[bands].to(like)
        self._rows, self._columns = (dct_matrix(size).to(like) for size in (height, width))

    def to_basis(self, x: torch.Tensor) -> torch.Tensor:
        """Coefficients ``(P, C, H, W)`` of images ``(P, C, H, W)``; an orthonormal map."""
        return torch.einsum("hwcd,pchw->pdhw", self._axes, self._rows @ x @ self._columns.mT)

    def from_basis(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Inverse and adjoint of :meth:`to_basis`."""
        return self._rows.mT @ torch.einsum("hwcd,pdhw->pchw", self._axes, coefficients) @ self._columns

    def solve(self, offset: torch.Tensor) -> torch.Tensor:
        """The inverse covariance times ``offset`` ``(P, C, H, W)``."""
        return self.from_basis(self.to_basis(offset) / self.variance)


@dataclass(frozen=True)
class CovarianceTable:
    r"""Band matrices at some noise levels, and between them.

    :math:`(1 / s^2 + 1 / \sigma^2) C_b` is interpolated linearly in log sigma, and kept beyond the ends: of a white
    Gaussian of standard deviation s it is the identity at every level.

    Attributes:
        sigmas: rising.
        matrices: ``(levels, bands, C, C)``.
        image_shape: ``(C, H, W)`` of what they are the covariance of.
        std: s, standard deviation of the clean latents.
    """

    sigmas: Sequence[float]
    matrices: torch.Tensor
    image_shape: tuple[int, int, int]
    std: float = 1.0

    def at(self, sigma: float) -> torch.Tensor:
        """``(bands, C, C)`` at ``sigma`` > 0."""
        logs = torch.tensor([math.log(s) for s in self.sigmas], dtype=torch.float64)
        place = min(max(math.log(sigma), logs[0].item()), logs[-1].item())
        high = min(max(int(torch.searchsorted(logs, place)), 1), len(logs) - 1)
        low = max(high - 1, 0)
        width = (logs[high] - logs[low]).item()
        share = (place - logs[low].item()) / width if width > 0 else 0.0
        below, above = (self.matrices[i] / self._white(self.sigmas[i]) for i in (low, high))
        return torch.lerp(below, above, share) * self._white(sigma)

    def covariance(self, sigma: float, like: torch.Tensor) -> BandedCovariance:
        """The covariance at ``sigma`` in the dtype and on the device of ``like``."""
        return BandedCovariance(self.at(sigma), self.image_shape, like)

    def root_mean_square(self, sigma: float) -> float:
        """Standard deviation of an element at ``sigma``, over all bands and channels."""
        bands = band_of(*self.image_shape[1:])
        trace = self.at(sigma).diagonal(dim1=-2, dim2=-1).mean(-1)
        return trace.cpu()[bands].mean().item() ** 0.5

    def _white(self, sigma: float) -> float:
        return 1 / (1 / self.std**2 + 1 / sigma**2)
