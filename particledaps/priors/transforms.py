"""What a denoiser sees of an image where no autoencoder is trained: its pixels, or two parts of them.

Each is an :class:`particledaps.priors.autoencoder.Autoencoder` without weights that also tells its ``parts``, the
channels of each part that is noised independently, the finest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from particledaps.priors.autoencoder import IdentityAutoencoder


class HaarTransform(nn.Module):
    r"""One level of the orthonormal Haar transform: 3 C channels of details, then C of averages, at half the side.

    Of the pixels :math:`a\ b` over :math:`c\ d` of a block, :math:`(a + b - c - d) / 2`, :math:`(a - b + c - d) / 2`,
    :math:`(a - b - c + d) / 2` are the details and :math:`(a + b + c + d) / 2` is the average (the C channels of the
    first detail, then of the second, ...). White noise stays white, so equal sigmas are those of the image.
    """

    redundant = False

    @staticmethod
    def parts(channels: int) -> tuple[int, ...]:
        """Details and averages of an image of ``channels`` channels."""
        return 3 * channels, channels

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, 4 C, H / 2, W / 2)``."""
        a, b = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
        c, d = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
        return torch.cat([a + b - c - d, a - b + c - d, a - b - c + d, a + b + c + d], dim=1) / 2

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """``(B, 4 C, H / 2, W / 2)`` -> ``(B, C, H, W)``, the inverse."""
        rows, columns, diagonals, averages = z.chunk(4, dim=1)
        blocks = torch.stack(
            [
                averages + rows + columns + diagonals,
                averages + rows - columns - diagonals,
                averages - rows + columns - diagonals,
                averages - rows - columns + diagonals,
            ],
            dim=2,
        )
        return F.pixel_shuffle((blocks / 2).flatten(1, 2), 2)


class TwoScaleTransform(nn.Module):
    """The image by space to depth and, as a part of its own, its copy at half the side (means of 2x2 blocks).

    For even sides that copy is also the bilinear one of the two-scale study (LIFT). It is redundant: ``decode`` reads
    the first part alone.
    """

    redundant = True

    @staticmethod
    def parts(channels: int) -> tuple[int, ...]:
        """The fine part and the coarse copy of an image of ``channels`` channels."""
        return 4 * channels, channels

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` -> ``(B, 5 C, H / 2, W / 2)``."""
        return torch.cat([F.pixel_unshuffle(x, 2), F.avg_pool2d(x, 2)], dim=1)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """``(B, 5 C, H / 2, W / 2)`` -> ``(B, C, H, W)``."""
        return F.pixel_shuffle(z[:, : z.shape[1] // 5 * 4], 2)


class Pixels(IdentityAutoencoder):
    """The image itself, one part."""

    redundant = False

    @staticmethod
    def parts(channels: int) -> tuple[int, ...]:
        """All channels."""
        return (channels,)


Transform = Pixels | HaarTransform | TwoScaleTransform
TRANSFORMS: dict[str, type[Transform]] = {"pixels": Pixels, "haar": HaarTransform, "two_scale": TwoScaleTransform}


def encoding_of(transform: nn.Module) -> str:
    """Its name in :data:`TRANSFORMS`."""
    return next(name for name, kind in TRANSFORMS.items() if type(transform) is kind)


def root_mean_square(scales: float | Sequence[float], parts: Sequence[int]) -> float:
    """Of a latent whose parts have the root mean squares ``scales`` (or all the same)."""
    if isinstance(scales, int | float):
        return float(scales)
    return float((sum(s**2 * c for s, c in zip(scales, parts, strict=True)) / sum(parts)) ** 0.5)
