"""Denoisers in closed form: the ground truth of the tests and the smallest priors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from particledaps.diffusion.levels import broadcast_sigma


class GaussianDenoiser(nn.Module):
    r"""Prior :math:`N(\mu, \Sigma)`: :math:`D(z; \sigma) = \mu + \Sigma (\Sigma + \sigma^2 I)^{-1} (z - \mu)`.

    Args:
        mean: ``(C, H, W)``.
        covariance: ``(n, n)`` over the flattened latent, ``n = C * H * W``, or a number (isotropic).
        parts: channels of each part with noise of its own, where sigma is ``(P, S)``; None: equal ones. The denoiser
            is the joint one of all parts.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(1, 1, 1), 1.0)
        >>> denoiser(torch.full((1, 1, 1, 1), 10.0), 3.0).item()  # 10 * 1 / (1 + 9)
        1.0
    """

    mean: torch.Tensor
    values: torch.Tensor
    vectors: torch.Tensor

    def __init__(
        self, mean: torch.Tensor, covariance: torch.Tensor | float, parts: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.parts = parts
        size = mean.numel()
        full = torch.as_tensor(covariance, dtype=mean.dtype)
        if full.ndim == 0:
            values, vectors = full.expand(size), torch.eye(size, dtype=mean.dtype)
        else:
            values, vectors = torch.linalg.eigh(full)
        self.register_buffer("mean", mean)
        self.register_buffer("values", values.clone())
        self.register_buffer("vectors", vectors)

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        offset = (z - self.mean).flatten(1)
        if torch.as_tensor(sigma).ndim == 2:
            return self._grouped(offset, broadcast_sigma(sigma, z, self.parts).square()).reshape(z.shape) + self.mean
        variance = broadcast_sigma(sigma, offset).square()
        centred = offset @ self.vectors
        shrunk = centred * (self.values / (self.values + variance))
        return (shrunk @ self.vectors.T).reshape(z.shape) + self.mean

    def _grouped(self, offset: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        covariance = self.vectors * self.values @ self.vectors.T
        noise = variance.expand(-1, *self.mean.shape).flatten(1)
        weights = torch.linalg.solve(covariance + torch.diag_embed(noise), offset[..., None])
        return (covariance @ weights)[..., 0]


class GaussianMixtureDenoiser(nn.Module):
    r"""Prior :math:`\sum_k w_k N(\mu_k, s_k^2 I)`.

    .. math:: D(z; \sigma) = \sum_k \pi_k(z) \left(\mu_k + \frac{s_k^2}{s_k^2 + \sigma^2} (z - \mu_k)\right), \quad
        \pi_k \propto w_k N(z; \mu_k, (s_k^2 + \sigma^2) I)

    Args:
        weights: ``(K,)`` positive.
        means: ``(K, C, H, W)``.
        stds: ``(K,)`` standard deviations.
    """

    log_weights: torch.Tensor
    means: torch.Tensor
    variances: torch.Tensor

    def __init__(self, weights: torch.Tensor, means: torch.Tensor, stds: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means)
        self.register_buffer("variances", stds.square())

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        offsets, total = self._offsets(z, sigma)
        responsibility = torch.softmax(self._log_joint(offsets, total), dim=1)
        component = self.means.flatten(1) + (self.variances / total)[..., None] * offsets
        return (responsibility[..., None] * component).sum(1).reshape(z.shape)

    def log_prob(self, z: torch.Tensor, sigma: torch.Tensor | float = 0.0) -> torch.Tensor:
        r""":math:`\log p(z; \sigma)`, ``(P,)``: of the prior itself at sigma 0, else of its noisy latents."""
        offsets, total = self._offsets(z, sigma)
        constant = 0.5 * offsets.shape[-1] * math.log(2 * math.pi)
        return torch.logsumexp(self._log_joint(offsets, total), dim=1) - constant

    def _offsets(self, z: torch.Tensor, sigma: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor]:
        """``z - mu_k`` ``(P, K, n)`` and ``s_k^2 + sigma^2`` ``(P, K)``."""
        sigma = torch.as_tensor(sigma, dtype=z.dtype, device=z.device).expand(len(z))
        return z.flatten(1)[:, None] - self.means.flatten(1), self.variances + sigma[:, None].square()

    def _log_joint(self, offsets: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """``log w_k N(z; mu_k, total_k)`` ``(P, K)`` but for the constant ``-n/2 log(2 pi)``."""
        return self.log_weights - 0.5 * (offsets.square().sum(-1) / total + offsets.shape[-1] * total.log())
