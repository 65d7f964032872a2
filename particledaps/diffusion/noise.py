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


TERMINAL_SIGMA = 1e3
"""Where a last timestep without signal stands: sigma would be infinite there."""


def zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    r"""Cumulative alphas ``(T,)`` of a schedule that is rescaled to end without signal (Lin et al. 2023, algorithm 1).

    .. math:: \sqrt{\bar\alpha'_t} = (\sqrt{\bar\alpha_t} - \sqrt{\bar\alpha_T})
        \frac{\sqrt{\bar\alpha_1}}{\sqrt{\bar\alpha_1} - \sqrt{\bar\alpha_T}}
    """
    roots = alphas_cumprod(betas).sqrt()
    return ((roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])).square()


class DiscreteNoise:
    r"""Map between sigma and the (fractional) timestep of a checkpoint.

    ``log sigma`` is interpolated linearly between the checkpoint's timesteps. Below the grid the lowest timestep is
    returned, above it the highest: a network is never asked about a level that it has not seen.

    A last value of 0 (zero terminal SNR) stands at :data:`TERMINAL_SIGMA`, and so does every timestep above it. Across
    the interval before it the signal :math:`1 / \sqrt{1 + \sigma^2}` is interpolated: log sigma runs away there.

    Args:
        alphas_cumprod: ``(T,)`` decreasing values in (0, 1); the last one may be 0.

    Attributes:
        sigmas: ``(T,)`` of the timesteps.
        terminal: does the schedule end without signal?

    Raises:
        ValueError: the values do not decrease or leave (0, 1).
    """

    def __init__(self, alphas_cumprod: torch.Tensor) -> None:
        values = alphas_cumprod.double()
        self.terminal = values.ndim == 1 and len(values) > 2 and values[-1].item() == 0
        inner = values[:-1] if self.terminal else values
        inside = bool(((inner > 0) & (inner < 1)).all())
        if values.ndim != 1 or len(values) < 2 or not inside or bool((values.diff() >= 0).any()):
            raise ValueError("alphas_cumprod must be a decreasing sequence in (0, 1)")
        self.sigmas, times = (1 / values - 1).sqrt(), torch.arange(len(values))
        if self.terminal:
            self.sigmas = self.sigmas.clamp(max=TERMINAL_SIGMA)
            times = torch.cat([times[self.sigmas < TERMINAL_SIGMA], times[-1:]])
        self._table = torch.stack([times.double(), self.sigmas[times].log()])
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
        """Timesteps and log sigmas on a device; copied there once, not at every call."""
        if device not in self._placed:
            self._placed[device] = self._table.to(device)
        return self._placed[device]

    def sigma_to_t(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Fractional timestep in [0, T - 1] of ``sigma`` > 0 (any shape), in the dtype of ``sigma``."""
        sigma = torch.as_tensor(sigma)
        times, grid = self._grid(sigma.device)
        log_sigma = sigma.double().log().clamp(grid[0], grid[-1])
        low = (torch.searchsorted(grid, log_sigma.contiguous(), right=True) - 1).clamp(0, len(grid) - 2)
        share = (log_sigma - grid[low]) / (grid[low + 1] - grid[low])
        if self.terminal:
            before, last = _signal(grid[-2:])
            by_signal = ((before - _signal(log_sigma)) / (before - last)).clamp(0, 1)
            share = torch.where(low == len(grid) - 2, by_signal, share)
        t = times[low] + share * (times[low + 1] - times[low])
        return t.to(sigma.dtype if sigma.is_floating_point() else torch.float32)

    def t_to_sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """Sigma at fractional timestep ``t`` in [0, T - 1] (any shape)."""
        t = torch.as_tensor(t)
        times, grid = self._grid(t.device)
        position = t.double().clamp(0, int(times[-1]))
        low = (torch.searchsorted(times, position.contiguous(), right=True) - 1).clamp(0, len(grid) - 2)
        share = (position - times[low]) / (times[low + 1] - times[low])
        log_sigma = grid[low] + share * (grid[low + 1] - grid[low])
        if self.terminal:
            before, last = _signal(grid[-2:])
            signal = before + share * (last - before)
            log_sigma = torch.where(low == len(grid) - 2, (1 / signal.square() - 1).log() / 2, log_sigma)
        return log_sigma.exp().to(t.dtype if t.is_floating_point() else torch.float32)


def _signal(log_sigma: torch.Tensor) -> torch.Tensor:
    """``1 / sqrt(1 + sigma^2)``, the square root of alphas_cumprod."""
    return 1 / (1 + (2 * log_sigma).exp()).sqrt()


class FlowNoise:
    r"""The map of rectified flow: time :math:`t = \sigma / (1 + \sigma)`, shown to the network as ``num_steps * t``.

    Time 1, pure noise, stands at :data:`TERMINAL_SIGMA`.
    """

    sigma_max = TERMINAL_SIGMA

    def __init__(self, num_steps: int = 1000) -> None:
        self.num_steps = num_steps

    def sigma_to_t(self, sigma: torch.Tensor | float) -> torch.Tensor:
        """Timestep in [0, num_steps] of ``sigma`` >= 0 (any shape)."""
        sigma = torch.as_tensor(sigma)
        time = torch.where(sigma >= TERMINAL_SIGMA, torch.ones_like(sigma), sigma / (1 + sigma))
        return self.num_steps * time

    def t_to_sigma(self, t: torch.Tensor | float) -> torch.Tensor:
        """Inverse of :meth:`sigma_to_t`."""
        time = torch.as_tensor(t) / self.num_steps
        return (time / (1 - time)).clamp(max=TERMINAL_SIGMA)


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
