"""Autoencoders between images in [-1, 1] and latents of unit scale."""

from typing import Protocol

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch.nn import functional as F


class Autoencoder(Protocol):
    """``encode(x) -> z`` and ``decode(z) -> x`` with ``x`` in [-1, 1]; decode is differentiable."""

    def encode(self, x: torch.Tensor) -> torch.Tensor: ...

    def decode(self, z: torch.Tensor) -> torch.Tensor: ...


class IdentityAutoencoder(nn.Module):
    """The autoencoder of a pixel prior: the latent is the image."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z


def build_kl_network(
    channels: tuple[int, ...], patch: int, latent_channels: int, resolution: int, layers: int, norm_groups: int
) -> AutoencoderKL:
    """An ``AutoencoderKL`` on ``patch x patch`` pixel blocks (space to depth).

    Working on blocks moves the arithmetic to a quarter of the positions with more channels each: at 64 px and equal
    time it has twice the weights of the pixel-level network (see PROJECT.md for the comparison).
    """
    depth = len(channels)
    return AutoencoderKL(
        in_channels=3 * patch**2,
        out_channels=3 * patch**2,
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=channels,
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=norm_groups,
        sample_size=resolution // patch,
        mid_block_add_attention=False,
    )


class KLAutoencoder(nn.Module):
    r"""Diffusers' ``AutoencoderKL`` with pixel blocks and latents standardised per channel.

    .. math:: z = (\mu_E(x) - m) / s, \qquad x = D(s z + m)

    Args:
        network: the diffusers network, on ``patch**2 * C`` channels.
        patch: side of the pixel blocks (1: none).
        mean: ``(c,)`` mean of each latent channel over the training images.
        std: ``(c,)`` standard deviation of each latent channel.
    """

    def __init__(self, network: AutoencoderKL, patch: int, mean: torch.Tensor, std: torch.Tensor) -> None:
        super().__init__()
        self.network, self.patch = network, patch
        self.register_buffer("mean", mean.reshape(1, -1, 1, 1).clone())
        self.register_buffer("std", std.reshape(1, -1, 1, 1).clone())

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` in [-1, 1] -> posterior mean ``(B, c, h, w)``, unit scale."""
        moments = self.network.encode(F.pixel_unshuffle(x, self.patch)).latent_dist
        return (moments.mean - self.mean) / self.std

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """``(B, c, h, w)`` -> image ``(B, C, H, W)``, nominally in [-1, 1], not clamped."""
        return F.pixel_shuffle(self.network.decode(z * self.std + self.mean).sample, self.patch)
