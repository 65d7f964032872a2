r"""A prior in closed form for photographs: stationary Gaussian images whose power spectrum falls as :math:`1 / f^2`.

It needs no training and no weights, so it serves as the plainest prior of real images, at any size.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from particledaps.diffusion.levels import broadcast_sigma
from particledaps.priors.autoencoder import IdentityAutoencoder
from particledaps.priors.errors import PriorError
from particledaps.priors.prior import Prior

COLOUR_AXES = ((1, 1, 1), (1, 0, -1), (1, -2, 1))
"""Luminance, red against blue, green against magenta: close to the principal axes of the colours of photographs."""
COLOUR_SHARES = (0.87, 0.12, 0.01)
"""Share of the variance on each axis, as in the colour photographs that scikit-image ships."""


class StationaryGaussianDenoiser(nn.Module):
    r"""Prior :math:`N(\mu, F^{-1} S F)` on the torus, a Wiener filter.

    .. math:: D(z; \sigma) = \mu + F^{-1} \frac{S}{S + \sigma^2} F (z - \mu)

    with the orthonormal Fourier transform F, after an orthonormal change of colour axes.

    Args:
        spectrum: ``(C, H, W // 2 + 1)`` power S on each colour axis, in ``rfft2`` layout.
        colour_axes: ``(C, C)`` orthonormal, one axis a row.
        mean: the value :math:`\mu` of every pixel.
    """

    def __init__(self, spectrum: torch.Tensor, colour_axes: torch.Tensor, mean: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("spectrum", spectrum)
        self.register_buffer("colour_axes", colour_axes)
        self.mean = mean

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        variance = broadcast_sigma(sigma, z).square()
        spectrum, axes = self.spectrum.to(z.dtype), self.colour_axes.to(z.dtype)
        turned = torch.einsum("kc,bchw->bkhw", axes, z - self.mean)
        filtered = torch.fft.rfft2(turned) * (spectrum / (spectrum + variance))
        shrunk = torch.fft.irfft2(filtered, s=z.shape[-2:])
        return self.mean + torch.einsum("kc,bkhw->bchw", axes, shrunk)


def power_spectrum(height: int, width: int, std: float, exponent: float = 2.0) -> torch.Tensor:
    r""":math:`S(f) \propto (f^2 + f_0^2)^{-exponent / 2}` with :math:`f_0` half a cycle an image, ``(H, W // 2 + 1)``.

    Scaled so that the standard deviation of a pixel is ``std``.
    """
    rows = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]
    columns = torch.fft.fftfreq(width, dtype=torch.float64)
    least = 0.5 / max(height, width)
    full = (rows.square() + columns.square() + least**2) ** (-exponent / 2)
    return (full * (std**2 / full.mean()))[:, : width // 2 + 1]


def build(
    device: torch.device | str = "cpu",
    compat: object = None,
    side: int = 256,
    channels: int = 3,
    std: float = 0.5,
    exponent: float = 2.0,
    mean: float = 0.0,
) -> Prior:
    """The prior, for ``model=stationary_gaussian``.

    Args:
        device: where it computes.
        compat: ignored; there is no network whose conventions could differ.
        side: side of the images in pixels.
        channels: 1 or 3.
        std: standard deviation of a pixel (range of images: [-1, 1]).
        exponent: of the power spectrum; photographs have about 2.
        mean: mean of every pixel.

    Raises:
        PriorError: a value is out of range.
    """
    if side < 2 or channels not in (1, 3) or not (std > 0 and math.isfinite(std)) or not exponent >= 0:
        raise PriorError(
            f"model.options: side={side}, channels={channels}, std={std}, exponent={exponent}; needed are a side of at "
            "least 2, 1 or 3 channels, a positive std and an exponent of at least 0"
        )
    axes, shares = torch.eye(1), torch.ones(1)
    if channels == 3:
        axes = nn.functional.normalize(torch.tensor(COLOUR_AXES, dtype=torch.float64), dim=1)
        shares = 3 * torch.tensor(COLOUR_SHARES, dtype=torch.float64)
    spectrum = shares[:, None, None] * power_spectrum(side, side, std, exponent)
    denoiser = StationaryGaussianDenoiser(spectrum, axes, mean).to(device)
    shape = (channels, side, side)
    return Prior("stationary_gaussian", IdentityAutoencoder(), denoiser, shape, shape, latent_std=std)
