"""Classifier-free guidance of a denoiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from particledaps.diffusion.levels import broadcast_sigma, first_level, per_particle
from particledaps.diffusion.score import Denoiser


class GuidedDenoiser(nn.Module):
    r"""Classifier-free guidance (Ho and Salimans 2022): :math:`D = D_\emptyset + w (D_c - D_\emptyset)`.

    ``w`` = 0 is the negative denoiser and ``w`` = 1 the conditional one, each without a call of the other. With a
    ``rescale`` :math:`\phi` the noise estimate :math:`\epsilon = (z - D) / \sigma` keeps more of the size that it has
    under the condition (Lin et al. 2023, eq. 15 and 16):

    .. math:: \epsilon' = \phi \, \epsilon \, \mathrm{std}(\epsilon_c) / \mathrm{std}(\epsilon) + (1 - \phi) \, \epsilon

    with standard deviations over one sample. That is diffusers' ``rescale_noise_cfg`` of a network that predicts the
    noise; of one that predicts v it is not, since that function then rescales v.

    Args:
        conditional: :math:`D_c`.
        negative: :math:`D_\emptyset`, the null condition or what to lead away from.
        scale: ``w``.
        rescale: :math:`\phi` in [0, 1].
        interval: guide where low <= sigma < high only, ``w`` = 1 elsewhere (Kynkaanniemi et al. 2024); with several
            parts the first one's sigma decides. None: everywhere.
        parts: channels of each part with noise of its own; None: one.
    """

    def __init__(
        self,
        conditional: Denoiser,
        negative: Denoiser,
        scale: float,
        rescale: float = 0.0,
        interval: Sequence[float] | None = None,
        parts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.conditional = conditional
        self.unconditional = negative  # this name is in the checksums of stored runs
        self.scale = scale
        self.rescale = rescale
        self.interval = interval
        self.parts = parts

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        inside = self._inside(sigma, z)
        everywhere = inside is None or bool(inside.all())
        if self.scale == 1 or (inside is not None and not inside.any()):
            return self.conditional(z, sigma)
        if self.scale == 0 and self.rescale == 0 and everywhere:
            return self.unconditional(z, sigma)
        toward, free = self.conditional(z, sigma), self.unconditional(z, sigma)
        output = self._rescaled(free + self.scale * (toward - free), toward, z, sigma)
        return output if inside is None or everywhere else torch.where(per_particle(inside, z), output, toward)

    def _inside(self, sigma: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor | None:
        """``(1,)`` or ``(P,)``: which samples are guided; None: all, and no GPU waits for the answer."""
        if self.interval is None:
            return None
        level, (low, high) = first_level(sigma, z), self.interval
        return (level >= low) & (level < high)

    def _rescaled(
        self, output: torch.Tensor, toward: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor | float
    ) -> torch.Tensor:
        if self.rescale == 0:
            return output
        s = broadcast_sigma(sigma, z, self.parts)
        noise, kept = (z - output) / s, (z - toward) / s
        ratio = per_particle(kept.flatten(1).std(1) / noise.flatten(1).std(1), z)
        return z - s * (self.rescale * ratio + 1 - self.rescale) * noise
