r"""Noise schedules of discrete checkpoints: sigma <-> timestep from their own ``alphas_cumprod``.

A variance-preserving network sees :math:`z_t = \sqrt{\bar\alpha_t} z_0 + \sqrt{1 - \bar\alpha_t} \epsilon`, which is
:math:`(z_0 + \sigma \epsilon) / \sqrt{1 + \sigma^2}` with :math:`\sigma_t = \sqrt{1 / \bar\alpha_t - 1}`.
"""

from __future__ import annotations

import math

import torch


def linear_betas(num_steps: int = 1000, start: float = 1e-4, end: float = 2e-2) -> torch.Tensor:
    """``beta_t`` linear in t (DDPM, Ho et al. 2020), float64 ``(num_steps,)``."""
    return torch.linspace(start, end, num_steps, dtype=torch.float64)


def scaled_linear_betas(num_steps: int = 1000, start: float = 0.0015, end: float = 0.0195) -> torch.Tensor:
    """``sqrt(beta_t)`` linear in t (latent diffusion, Rombach et al. 2022), float64 ``(num_steps,)``."""
    return torch.linspace(math.sqrt(start), math.sqrt(end), num_steps, dtype=torch.float64).square()


def cosine_betas(num_steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> torch.Tensor:
    """Betas of the cosine schedule (Nichol and Dhariwal 2021, eq. 17), float64 ``(num_steps,)``."""
    time = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
    alphas_cumprod = torch.cos((time + offset) / (1 + offset) * math.pi / 2).square()
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=largest)


def alphas_cumprod(betas: torch.Tensor) -> torch.Tensor:
    """Cumulative product of ``1 - beta``, float64."""
    return (1 - betas.double()).cumprod(0)


class DiscreteNoise:
    r"""Map between sigma and the (fractional) timestep of a checkpoint.

    ``log sigma`` is interpolated linearly between the checkpoint's timesteps. Below the grid the lowest timestep is
    returned, above it the highest: a network is never asked about a level that it has not seen.

    Args:
        alphas_cumprod: ``(T,)`` decreasing values in (0, 1).

    Raises:
        ValueError: the values do not decrease or leave (0, 1).
    """

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        values = alphas_cumprod.double()
        inside = bool(((values > 0) & (values < 1)).all())
        if values.ndim != 1 or len(values) < 2 or not inside or bool((values.diff() >= 0).any()):
            raise ValueError("alphas_cumprod must be a decreasing sequence in (0, 1)")
        self.sigmas = (1 / values - 1).sqrt()
        self._log_sigmas = self.sigmas.log()
        self._placed: dict[torch.device, torch.Tensor] = {}

    @property
    def sigma_min(self) -> float:
        """The smallest sigma of the grid."""
        return self.sigmas[0].item()

    @property
    def sigma_max(self) -> float:
        """The largest sigma of the grid."""
        return self.sigmas[-1].item()

    def _grid(self, device: torch.device) -> torch.Tensor:
        """Log sigmas on a device; copied there once, not at every call."""
        if device not in self._placed:
            self._placed[device] = self._log_sigmas.to(device)
        return self._placed[device]

    def sigma_to_t(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Fractional timestep in [0, T - 1] of ``sigma`` > 0 (any shape), in the dtype of ``sigma``."""
        sigma = torch.as_tensor(sigma)
        grid = self._grid(sigma.device)
        log_sigma = sigma.double().log().clamp(grid[0], grid[-1])
        low = (torch.searchsorted(grid, log_sigma.contiguous(), right=True) - 1).clamp(0, len(grid) - 2)
        t = low + (log_sigma - grid[low]) / (grid[low + 1] - grid[low])
        return t.to(sigma.dtype if sigma.is_floating_point() else torch.float32)

    def t_to_sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """Sigma at fractional timestep ``t`` in [0, T - 1] (any shape)."""
        t = torch.as_tensor(t)
        grid = self._grid(t.device)
        position = t.double().clamp(0, len(grid) - 1)
        low = position.floor().long().clamp(max=len(grid) - 2)
        log_sigma = grid[low] + (position - low) * (grid[low + 1] - grid[low])
        return log_sigma.exp().to(t.dtype if t.is_floating_point() else torch.float32)


class ContinuousVPNoise:
    r"""The continuous linear-beta map that DAPS applies to every checkpoint (``compat.timestep_map``).

    .. math:: t(\sigma) = \frac{\sqrt{\beta_{min}^2 + 2 \beta_d \ln(1 + \sigma^2)} - \beta_{min}}{\beta_d}, \qquad
        c_{noise} = (M - 1) t(\sigma)

    Right for DDPM pixel checkpoints; wrong for latent ones (sigma = 10 is read as 6.8), see reference DAPS,
    ``VPPrecond``.
    """

    def __init__(self, beta_d: float = 19.9, beta_min: float = 0.1, num_steps: int = 1000) -> None:
        self.beta_d = beta_d
        self.beta_min = beta_min
        self.num_steps = num_steps

    def sigma_to_t(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Fractional timestep of ``sigma`` >= 0."""
        sigma = torch.as_tensor(sigma)
        root = (self.beta_min**2 + 2 * self.beta_d * torch.log1p(sigma.square())).sqrt()
        return (self.num_steps - 1) * (root - self.beta_min) / self.beta_d

    def t_to_sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """Inverse of :meth:`sigma_to_t`."""
        time = torch.as_tensor(t) / (self.num_steps - 1)
        return torch.expm1(0.5 * self.beta_d * time.square() + self.beta_min * time).sqrt()


class ContinuousScaledVPNoise:
    r"""The continuous scaled-linear map that DAPS applies to Stable Diffusion (``compat.timestep_map``).

    With :math:`\beta(t) = (a t + b)^2`, :math:`b = \sqrt{T \beta_{start}}`, :math:`a = \sqrt{T \beta_{end}} - b`:

    .. math:: t(\sigma) = \frac{(3 a \ln(1 + \sigma^2) + b^3)^{1/3} - b}{a}, \qquad c_{noise} = T t(\sigma)
    """

    def __init__(self, beta_start: float = 0.00085, beta_end: float = 0.012, num_steps: int = 1000) -> None:
        self.b, self.num_steps = math.sqrt(num_steps * beta_start), num_steps
        self.a = math.sqrt(num_steps * beta_end) - self.b

    def sigma_to_t(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Fractional timestep of ``sigma`` >= 0."""
        sigma = torch.as_tensor(sigma)
        root = (3 * self.a * torch.log1p(sigma.square()) + self.b**3) ** (1 / 3)
        return self.num_steps * (root - self.b) / self.a

    def t_to_sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """Inverse of :meth:`sigma_to_t`."""
        time = torch.as_tensor(t) / self.num_steps
        return torch.expm1(((self.a * time + self.b) ** 3 - self.b**3) / (3 * self.a)).sqrt()
