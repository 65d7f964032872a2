r"""Wrappers that make denoisers ``D(z; sigma) = E[z0 | z0 + sigma * eps = z]`` from networks.

All of them share one form (Karras et al. 2022, eq. 7):

.. math:: D(z; \sigma) = c_{skip} z + c_{out} F(c_{in} z, c_{noise}), \qquad
    \nabla_z \log p(z; \sigma) = (D(z; \sigma) - z) / \sigma^2

``sigma`` is a scalar, ``(P,)`` (one level a particle) or ``(P, S)`` (a level of its own for each of S parts of the
channels, which only the EDM wrapper and networks that know S levels take).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from particledaps.diffusion.levels import broadcast_sigma, network_sigma

Network = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


class NoiseMap(Protocol):
    """Anything that tells a network's timestep for a sigma."""

    def sigma_to_t(self, sigma: torch.Tensor | float) -> torch.Tensor: ...


class _TimedDenoiser(nn.Module):
    """A network that is told a timestep.

    Args:
        network: ``network(input, t) -> prediction``.
        noise: the network's own map from sigma to timestep.
    """

    def __init__(self, network: Network, noise: NoiseMap) -> None:
        super().__init__()
        self.network, self.noise = network, noise

    def around(self, network: Network) -> _TimedDenoiser:
        """The same of another network."""
        return type(self)(network, self.noise).train(self.training)


class EpsilonDenoiser(_TimedDenoiser):
    r"""From a network that predicts the noise: :math:`D = z - \sigma F(z / \sqrt{1 + \sigma^2}, t(\sigma))`.

    Args:
        network: ``network(input, t) -> epsilon``.
        noise: the network's own map from sigma to timestep.
    """

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        s = broadcast_sigma(sigma, z)
        epsilon = self.network(z / (1 + s.square()).sqrt(), self.noise.sigma_to_t(network_sigma(sigma, z)))
        return z - s * epsilon


class VDenoiser(_TimedDenoiser):
    r"""From a network that predicts :math:`v = \sqrt{\bar\alpha} \epsilon - \sqrt{1 - \bar\alpha} z_0`.

    .. math:: D = \frac{z}{1 + \sigma^2} - \frac{\sigma}{\sqrt{1 + \sigma^2}} F

    (Salimans and Ho 2022.)
    """

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        s = broadcast_sigma(sigma, z)
        scale = (1 + s.square()).sqrt()
        v = self.network(z / scale, self.noise.sigma_to_t(network_sigma(sigma, z)))
        return z / scale.square() - s / scale * v


class X0Denoiser(_TimedDenoiser):
    r"""From a network that predicts the clean latent: :math:`D = F(z / \sqrt{1 + \sigma^2}, t(\sigma))`."""

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        s = broadcast_sigma(sigma, z)
        return self.network(z / (1 + s.square()).sqrt(), self.noise.sigma_to_t(network_sigma(sigma, z)))


class FlowDenoiser(_TimedDenoiser):
    r"""From a network that predicts the velocity :math:`\epsilon - z_0` of rectified flow (Liu et al. 2023).

    It sees :math:`(1 - t) z_0 + t \epsilon = z / (1 + \sigma)` with :math:`t = \sigma / (1 + \sigma)`:

    .. math:: D = \frac{z - \sigma F(z / (1 + \sigma), t)}{1 + \sigma}

    Args:
        network: ``network(input, t) -> velocity``.
        noise: the map from sigma to the network's timestep.
    """

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        s = broadcast_sigma(sigma, z)
        velocity = self.network(z / (1 + s), self.noise.sigma_to_t(network_sigma(sigma, z)))
        return (z - s * velocity) / (1 + s)


class EDMDenoiser(nn.Module):
    r"""EDM preconditioning (Karras et al. 2022, table 1) of a raw network ``F``.

    .. math:: c_{skip} = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}, \quad
        c_{out} = \frac{\sigma \sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
        c_{in} = \frac{1}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad c_{noise} = k \ln \sigma

    Each part of a prior with several has a sigma and a :math:`\sigma_d` of its own; the network is given them all.

    Args:
        network: ``network(input, c_noise) -> F``, with ``c_noise`` ``(P,)``, or ``(P, S)`` for S > 1 parts.
        sigma_data: root mean square :math:`\sigma_d` of the latents; a number, or one a part.
        noise_scale: ``k``; 1/4 in the paper, larger where the network embeds timesteps up to 1000.
        parts: channels of each part with noise of its own; None: one part.
        sigma_min: the network is told no smaller level: that of a part which is held clean while another has noise.
    """

    def __init__(
        self,
        network: Network,
        sigma_data: float | Sequence[float] = 1.0,
        noise_scale: float = 0.25,
        parts: Sequence[int] | None = None,
        sigma_min: float = 0.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.sigma_data = sigma_data
        self.noise_scale = noise_scale
        self.parts = tuple(parts) if parts and len(parts) > 1 else None
        self.sigma_min = sigma_min
        self._scales: torch.Tensor | None = None

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        s, d = broadcast_sigma(sigma, z, self.parts), self._data_scale(z)
        total = s.square() + d**2
        level = network_sigma(sigma, z, 1 if self.parts is None else len(self.parts))
        output = self.network(z / total.sqrt(), self.noise_scale * level.clamp(min=self.sigma_min).log())
        return d**2 / total * z + s * d / total.sqrt() * output

    def around(self, network: Network) -> EDMDenoiser:
        """The same preconditioning of another network."""
        other = EDMDenoiser(network, self.sigma_data, self.noise_scale, self.parts, self.sigma_min)
        return other.train(self.training)

    def _data_scale(self, z: torch.Tensor) -> torch.Tensor | float:
        if isinstance(self.sigma_data, int | float):
            return self.sigma_data
        if self._scales is None or self._scales.device != z.device:
            self._scales = torch.tensor([list(self.sigma_data)], device=z.device)
        return broadcast_sigma(self._scales, z, self.parts)
