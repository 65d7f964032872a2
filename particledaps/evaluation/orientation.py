"""Which of an operator's ambiguous images does the prior find more plausible, and by how much?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from particledaps.diffusion.score import denoising_loss

if TYPE_CHECKING:
    from particledaps.priors.prior import Prior

SIGMAS = (0.3, 0.5, 0.8, 1.2, 2.0)
NUM_DRAWS = 4
LOG_STEP = math.log(SIGMAS[-1] / SIGMAS[0]) / (len(SIGMAS) - 1)


def plausibility_loss(prior: Prior, images: torch.Tensor, seed: int = 0) -> torch.Tensor:
    r"""Denoising loss of encoded images, ``(B,)``; lower is more plausible.

    .. math:: \sum_\sigma \frac{1}{\sigma^2} \frac1n \sum_{i=1}^n |D(z + \sigma \epsilon_i; \sigma) - z|^2,
        \qquad z = E(x)

    over :data:`SIGMAS` with :data:`NUM_DRAWS` draws, the same noise for every image, so that images of one call (and
    of two calls with one seed) compare fairly. Divided by the number of latent elements.

    Args:
        prior: autoencoder and denoiser.
        images: ``(B, C, H, W)`` in [-1, 1].
        seed: of the common noise.
    """
    return latent_plausibility(prior, prior.encode(images), seed)


def latent_plausibility(prior: Prior, z: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """:func:`plausibility_loss` of latents ``(B, ...)`` themselves."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(SIGMAS), NUM_DRAWS)
    noise = torch.stack([torch.randn(z.shape[1:], generator=generator) for _ in range(math.prod(shape))]).to(z)
    noise = noise.reshape(1, *shape, *z.shape[1:]).expand(len(z), *(-1,) * (z.ndim + 1))
    return denoising_loss(prior.denoiser, z, SIGMAS, noise)


def prior_energy(prior: Prior, plausibility: torch.Tensor) -> torch.Tensor:
    r"""The part of :math:`-\log p(z)` that the sigmas of :func:`plausibility_loss` see, in nats, ``(B,)``.

    .. math:: -\log p(z) = c + \int \mathbb{E} |D(z + \sigma \epsilon; \sigma) - z|^2 \, \frac{d \ln \sigma}{\sigma^2}

    (Kingma et al. 2021, Variational Diffusion Models, in continuous time), the integral as a sum over
    :data:`SIGMAS`, which are nearly equidistant in log sigma.

    Args:
        prior: whose latents were denoised.
        plausibility: ``(B,)`` from :func:`plausibility_loss`.
    """
    return math.prod(prior.latent_shape) * LOG_STEP * plausibility


def posterior_energy(prior: Prior, plausibility: torch.Tensor, loss: torch.Tensor, tau: float) -> torch.Tensor:
    r""":math:`L / 2 \tau^2 - \log p(z)` in nats up to a constant, ``(B,)``.

    Args:
        prior: whose latents were denoised.
        plausibility: ``(B,)`` from :func:`plausibility_loss`.
        loss: ``(B,)`` data losses :math:`|A(x) - y|^2`.
        tau: standard deviation of the likelihood.
    """
    return loss / (2 * tau**2) + prior_energy(prior, plausibility)
