r"""Wrappers that make denoisers ``D(z; sigma) = E[z0 | z0 + sigma * eps = z]`` from networks.

All of them share one form (Karras et al. 2022, eq. 7):

.. math:: D(z; \sigma) = c_{skip} z + c_{out} F(c_{in} z, c_{noise}), \qquad
    \nabla_z \log p(z; \sigma) = (D(z; \sigma) - z) / \sigma^2

``sigma`` is a scalar, ``(P,)`` (one level a particle) or ``(P, S)`` (S equal groups of channels noised independently).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from particledaps.diffusion.levels import broadcast_sigma, network_sigma
from particledaps.diffusion.score import Denoiser

Network = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


class NoiseMap(Protocol):
    """Anything that tells a network's timestep for a sigma."""

    def sigma_to_t(self, sigma: torch.Tensor | float) -> torch.Tensor: ...


class EpsilonDenoiser(nn.Module):
    r"""From a network that predicts the noise: :math:`D = z - \sigma F(z / \sqrt{1 + \sigma^2}, t(\sigma))`.

    Args:
        network: ``network(input, t) -> epsilon``.
        noise: the network's own map from sigma to timestep.
    """

    def __init__(self, network: Network, noise: NoiseMap) -> None:
        super().__init__()
        self.network, self.noise = network, noise

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        s = broadcast_sigma(sigma, z)
        epsilon = self.network(z / (1 + s.square()).sqrt(), self.noise.sigma_to_t(network_sigma(sigma, z)))
        return z - s * epsilon


class VDenoiser(nn.Module):
    r"""From a network that predicts :math:`v = \sqrt{\bar\alpha} \epsilon - \sqrt{1 - \bar\alpha} z_0`.

    .. math:: D = \frac{z}{1 + \sigma^2} - \frac{\sigma}{\sqrt{1 + \sigma^2}} F

    (Salimans and Ho 2022.)
    """

    def __init__(self, network: Network, noise: NoiseMap) -> None:
        super().__init__()
        self.network, self.noise = network, noise

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        s = broadcast_sigma(sigma, z)
        scale = (1 + s.square()).sqrt()
        v = self.network(z / scale, self.noise.sigma_to_t(network_sigma(sigma, z)))
        return z / scale.square() - s / scale * v


class X0Denoiser(nn.Module):
    r"""From a network that predicts the clean latent: :math:`D = F(z / \sqrt{1 + \sigma^2}, t(\sigma))`."""

    def __init__(self, network: Network, noise: NoiseMap) -> None:
        super().__init__()
        self.network, self.noise = network, noise

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        s = broadcast_sigma(sigma, z)
        return self.network(z / (1 + s.square()).sqrt(), self.noise.sigma_to_t(network_sigma(sigma, z)))


class EDMDenoiser(nn.Module):
    r"""EDM preconditioning (Karras et al. 2022, table 1) of a raw network ``F``.

    .. math:: c_{skip} = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}, \quad
        c_{out} = \frac{\sigma \sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
        c_{in} = \frac{1}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad c_{noise} = k \ln \sigma

    Args:
        network: ``network(input, c_noise) -> F``.
        sigma_data: standard deviation :math:`\sigma_d` of the latents.
        noise_scale: ``k``; 1/4 in the paper, larger where the network embeds timesteps up to 1000.
    """

    def __init__(self, network: Network, sigma_data: float = 1.0, noise_scale: float = 0.25) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data
        self.noise_scale = noise_scale

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        s, d = broadcast_sigma(sigma, z), self.sigma_data
        total = s.square() + d**2
        output = self.network(z / total.sqrt(), self.noise_scale * network_sigma(sigma, z).log())
        return d**2 / total * z + s * d / total.sqrt() * output


class GuidedDenoiser(nn.Module):
    r"""Classifier-free guidance (Ho and Salimans 2022): :math:`D = D_\emptyset + w (D_c - D_\emptyset)`.

    Args:
        conditional: the denoiser with its condition.
        unconditional: the same network with the null condition.
        scale: ``w``; 1 is the conditional denoiser, larger values exaggerate the condition.
    """

    def __init__(self, conditional: Denoiser, unconditional: Denoiser, scale: float) -> None:
        super().__init__()
        self.conditional = conditional
        self.unconditional = unconditional
        self.scale = scale

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        free = self.unconditional(z, sigma)
        return free + self.scale * (self.conditional(z, sigma) - free)
