"""Autoencoders between images in [-1, 1] and latents of unit scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn
from torch.nn import functional as F

if TYPE_CHECKING:  # its import takes seconds, and only loading a prior needs it
    from diffusers import AutoencoderKL, VQModel


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
    channels: tuple[int, ...],
    patch: int,
    latent_channels: int,
    resolution: int,
    layers: int,
    norm_groups: int,
    image_channels: int = 3,
) -> AutoencoderKL:
    """An ``AutoencoderKL`` on ``patch x patch`` pixel blocks (space to depth).

    Working on blocks moves the arithmetic to a quarter of the positions with more channels each: at 64 px and equal
    time it has twice the weights of the pixel-level network (compared in docs/lab/prior.md).
    """
    from diffusers import AutoencoderKL

    depth = len(channels)
    return AutoencoderKL(
        in_channels=image_channels * patch**2,
        out_channels=image_channels * patch**2,
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


class LatentAutoencoder(nn.Module):
    r"""Diffusers' ``VQModel`` or ``AutoencoderKL`` as it stands in latent diffusion checkpoints.

    .. math:: z = s \, (E(x) - m) / \ell, \qquad x = D(z \ell / s + m)

    ``E`` is the encoder before quantisation (VQ) or the posterior mean (KL); Rombach et al. 2022. VQ-f4 has s = 1;
    most networks have no m and no l.

    Args:
        network: the diffusers network.
        scale: ``s``.
        quantize: replace latents by their nearest code inside decode (VQ only), with the straight-through gradient.
        mean: ``(c,)``, diffusers' ``latents_mean`` plus ``shift_factor``; None: 0, with no operation.
        std: ``(c,)``, diffusers' ``latents_std``; None: 1, with no operation.
    """

    def __init__(
        self,
        network: VQModel | AutoencoderKL,
        scale: float,
        quantize: bool = False,
        mean: torch.Tensor | None = None,
        std: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.scale = scale
        self.quantize = quantize
        self.discrete = type(network).__name__ == "VQModel"
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, None if value is None else value.reshape(1, -1, 1, 1).clone())

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` in [-1, 1] -> ``(B, c, h, w)``."""
        code = self.network.encode(x.to(self.network.dtype))
        latents = (code.latents if self.discrete else code.latent_dist.mean).to(x.dtype)
        latents = latents if self.mean is None else latents - self.mean
        return self.scale * (latents if self.std is None else latents / self.std)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """``(B, c, h, w)`` -> image ``(B, C, H, W)``, nominally in [-1, 1], not clamped."""
        code = (z if self.std is None else z * self.std) / self.scale
        code = (code if self.mean is None else code + self.mean).to(self.network.dtype)
        options = {"force_not_quantize": not self.quantize} if self.discrete else {}
        return self.network.decode(code, **options).sample.to(z.dtype)


class ResizedAutoencoder(nn.Module):
    """An autoencoder of ``inner_size`` px images that shows itself at ``image_size`` px (bilinear, no antialiasing).

    DAPS runs 512 px Stable Diffusion on 256 px measurements this way.
    """

    def __init__(self, autoencoder: Autoencoder, image_size: int, inner_size: int) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.image_size = image_size
        self.inner_size = inner_size

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Enlarge, then encode."""
        return self.autoencoder.encode(F.interpolate(x, (self.inner_size, self.inner_size), mode="bilinear"))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Decode, then shrink."""
        return F.interpolate(self.autoencoder.decode(z), (self.image_size, self.image_size), mode="bilinear")
