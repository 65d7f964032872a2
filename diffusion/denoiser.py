r"""Denoisers ``D(z; sigma) = E[z0 | z0 + sigma * eps = z]`` and the wrappers that make them from networks.

All of them share one form (Karras et al. 2022, eq. 7):

.. math:: D(z; \sigma) = c_{skip} z + c_{out} F(c_{in} z, c_{noise}), \qquad
    \nabla_z \log p(z; \sigma) = (D(z; \sigma) - z) / \sigma^2

``sigma`` is a scalar, ``(P,)`` (one level a particle) or ``(P, S)`` (S equal groups of channels noised independently).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Denoiser(Protocol):
    """``denoiser(z, sigma) -> E[z0 | z]`` with ``z`` of shape ``(P, C, H, W)``."""

    def __call__(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor: ...


class NoiseMap(Protocol):
    """Anything that tells a network's timestep for a sigma."""

    def sigma_to_t(self, sigma: torch.Tensor | float) -> torch.Tensor: ...


def broadcast_sigma(sigma: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor:
    """Reshape a scalar, ``(P,)`` or ``(P, S)`` sigma so that it multiplies ``z`` of shape ``(P, C, ...)``.

    Raises:
        ValueError: the shape fits neither the particles nor equal groups of channels.
    """
    sigma = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
    trailing = (1,) * (z.ndim - 2)
    if sigma.ndim == 0:
        return sigma
    if sigma.ndim == 1 and len(sigma) in (1, len(z)):
        return sigma.reshape(-1, 1, *trailing)
    if sigma.ndim == 2 and len(sigma) in (1, len(z)) and z.shape[1] % sigma.shape[1] == 0:
        return sigma.repeat_interleave(z.shape[1] // sigma.shape[1], dim=1).reshape(len(sigma), -1, *trailing)
    raise ValueError(f"sigma of shape {tuple(sigma.shape)} does not fit z of shape {tuple(z.shape)}")


def network_sigma(sigma: torch.Tensor | float, z: torch.Tensor) -> torch.Tensor:
    """Sigma as one value a particle, ``(P,)``, for a network's timestep embedding."""
    sigma = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
    if sigma.ndim > 1:
        raise ValueError("this network knows one noise level a particle, not (P, S)")
    return sigma.expand(len(z))


def score(denoiser: Denoiser, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
    """``(D(z; sigma) - z) / sigma^2``."""
    return (denoiser(z, sigma) - z) / broadcast_sigma(sigma, z).square()


def denoising_loss(denoiser: Denoiser, z: torch.Tensor, sigmas: Sequence[float], noise: torch.Tensor) -> torch.Tensor:
    r"""Denoising loss of clean latents, ``(P,)``; lower is more plausible.

    .. math:: \sum_\sigma \frac{1}{\sigma^2} |D(z + \sigma \epsilon_{\sigma i}; \sigma) - z|^2

    averaged over elements and draws i.

    Args:
        denoiser: of the latents.
        z: ``(P, C, H, W)``.
        sigmas: noise levels, S of them.
        noise: ``(P, S, n, C, H, W)``, n draws a level; the same for latents that are compared.
    """
    total = z.new_zeros(len(z))
    with torch.no_grad():
        for level, sigma in enumerate(sigmas):
            for draw in noise[:, level].unbind(1):
                error = denoiser(z + sigma * draw, sigma) - z
                total += error.square().flatten(1).mean(1) / (sigma**2 * noise.shape[2])
    return total


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
        self.network, self.sigma_data, self.noise_scale = network, sigma_data, noise_scale

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
        self.conditional, self.unconditional, self.scale = conditional, unconditional, scale

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        free = self.unconditional(z, sigma)
        return free + self.scale * (self.conditional(z, sigma) - free)
