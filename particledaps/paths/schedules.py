r"""Sigma paths: descending tensors of noise levels, ``(N + 1,)`` float64.

Every schedule of this project (annealing, inner ODE) is such a tensor. All builders go from ``sigma_max`` to
``sigma_min`` in ``num_steps`` intervals; ``end="zero"`` then replaces the last node by 0 (the denoiser is never called
there), ``end="sigma_min"`` keeps it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

ENDS = ("zero", "sigma_min")


def first_level_at_most(path: torch.Tensor, sigma: float) -> int | None:
    """The first level of an annealing path ``(K + 1,)`` whose sigma is at most ``sigma``; None if there is none."""
    return next((k for k, own in enumerate(path[:-1].tolist()) if own <= sigma), None)


def _finish(sigmas: torch.Tensor, sigma_max: float, sigma_min: float, end: str) -> torch.Tensor:
    if end not in ENDS:
        raise ValueError(f"end={end!r}: allowed are {', '.join(ENDS)}")
    sigmas = sigmas.clone()
    sigmas[0], sigmas[-1] = sigma_max, 0.0 if end == "zero" else sigma_min
    return sigmas


def _positions(num_steps: int, sigma_max: float, sigma_min: float) -> torch.Tensor:
    if num_steps < 1 or not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"a path needs num_steps >= 1 and 0 < sigma_min < sigma_max, got {num_steps}, {sigma_min}, {sigma_max}"
        )
    return torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)


def edm_path(num_steps: int, sigma_max: float, sigma_min: float, rho: float = 7.0, end: str = "zero") -> torch.Tensor:
    r"""Polynomial spacing (Karras et al. 2022, eq. 5).

    .. math:: \sigma_i = (\sigma_{max}^{1/\rho} + \tfrac{i}{N} (\sigma_{min}^{1/\rho} - \sigma_{max}^{1/\rho}))^\rho

    Example:
        >>> edm_path(4, sigma_max=10.0, sigma_min=0.1).round(decimals=3).tolist()
        [10.0, 4.07, 1.451, 0.432, 0.0]
    """
    r = _positions(num_steps, sigma_max, sigma_min)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return _finish((high + r * (low - high)) ** rho, sigma_max, sigma_min, end)


def ve_path(num_steps: int, sigma_max: float, sigma_min: float, end: str = "zero") -> torch.Tensor:
    r"""Geometric spacing of the VE schedule (Song et al. 2021).

    .. math:: \sigma_i = \sigma_{max} (\sigma_{min} / \sigma_{max})^{i/N}
    """
    r = _positions(num_steps, sigma_max, sigma_min)
    return _finish(sigma_max * (sigma_min / sigma_max) ** r, sigma_max, sigma_min, end)


def vp_path(
    num_steps: int,
    sigma_max: float,
    sigma_min: float,
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    power: int = 1,
    end: str = "zero",
) -> torch.Tensor:
    r"""Uniform in the time of a variance-preserving diffusion with :math:`\beta(t) = (a t + b)^n`.

    .. math:: \sigma(t)^2 = \exp\left(\int_0^t \beta\right) - 1, \qquad
        \int_0^t \beta = \frac{(a t + b)^{n+1} - b^{n+1}}{a (n + 1)}

    with :math:`b = \beta_{min}^{1/n}`, :math:`a = \beta_{max}^{1/n} - b`; ``power`` n = 1 is "linear", 2 is
    "scaled linear".
    """
    r = _positions(num_steps, sigma_max, sigma_min)
    n, b = power, beta_min ** (1 / power)
    a = beta_max ** (1 / n) - b

    def time(sigma: float) -> float:
        return ((a * (n + 1) * math.log1p(sigma**2) + b ** (n + 1)) ** (1 / (n + 1)) - b) / a

    t = time(sigma_max) + r * (time(sigma_min) - time(sigma_max))
    integral = ((a * t + b) ** (n + 1) - b ** (n + 1)) / (a * (n + 1))
    return _finish(torch.expm1(integral).sqrt(), sigma_max, sigma_min, end)


def scaled_vp_path(num_steps: int, sigma_max: float, sigma_min: float, end: str = "zero") -> torch.Tensor:
    """:func:`vp_path` with the scaled-linear betas of latent diffusion (0.0015 to 0.0195 in 1 000 steps)."""
    return vp_path(num_steps, sigma_max, sigma_min, beta_min=1.5, beta_max=19.5, power=2, end=end)


def cosine_path(num_steps: int, sigma_max: float, sigma_min: float, end: str = "zero") -> torch.Tensor:
    r"""Uniform in the angle :math:`\arctan \sigma`, i.e. :math:`\bar\alpha = \cos^2` (Nichol and Dhariwal 2021)."""
    r = _positions(num_steps, sigma_max, sigma_min)
    high, low = math.atan(sigma_max), math.atan(sigma_min)
    return _finish(torch.tan(high + r * (low - high)), sigma_max, sigma_min, end)


def tan_path(num_steps: int, sigma_max: float, sigma_min: float, scale: float = 1.0, end: str = "zero") -> torch.Tensor:
    r"""Uniform in the angle :math:`\arctan(\sigma / c)`; with c = 1 this is :func:`cosine_path`.

    For data of one Gaussian of standard deviation c no other path of Euler steps comes as near to that deviation: each
    step multiplies it by :math:`\cos \Delta\theta` (``scale`` is c).

    Example:
        >>> tan_path(3, sigma_max=2.0, sigma_min=0.1, scale=0.5).round(decimals=3).tolist()
        [2.0, 0.699, 0.323, 0.0]
    """
    r = _positions(num_steps, sigma_max, sigma_min)
    high, low = math.atan(sigma_max / scale), math.atan(sigma_min / scale)
    return _finish(scale * torch.tan(high + r * (low - high)), sigma_max, sigma_min, end)


AYS_SIGMAS = {
    "ays": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays_xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays_video": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""Ten steps of Align Your Steps (Sabour et al. 2024) for Stable Diffusion 1.5, XL and Stable Video Diffusion."""


def ays_path(num_steps: int, sigma_max: float, sigma_min: float, table: str = "ays", end: str = "zero") -> torch.Tensor:
    """A table of :data:`AYS_SIGMAS`, interpolated in log sigma, and scaled to begin at ``sigma_max``.

    Its last noise level is the table's, scaled; ``sigma_min`` is taken with ``end="sigma_min"`` alone.
    """
    r = _positions(num_steps, sigma_max, sigma_min)
    logs = torch.tensor(AYS_SIGMAS[table], dtype=torch.float64).log()
    place = r * (len(logs) - 1)
    low = place.floor().long().clamp(max=len(logs) - 2)
    sigmas = torch.lerp(logs[low], logs[low + 1], place - low).exp()
    return _finish(sigmas * (sigma_max / sigmas[0]), sigma_max, sigma_min, end)


def trailing_timesteps(num_steps: int, total: int) -> torch.Tensor:
    """``num_steps`` timesteps of ``total`` from the last one down in equal strides, float64 (Lin et al. 2023).

    Example:
        >>> trailing_timesteps(4, 1000).tolist()
        [999.0, 749.0, 499.0, 249.0]
    """
    if not 1 <= num_steps <= total:
        raise ValueError(f"{num_steps} trailing steps of {total} timesteps")
    return (total * (1 - torch.arange(num_steps, dtype=torch.float64) / num_steps)).round() - 1


DRAWING_PATHS = ("edm", "cosine", "tan", "trailing", *AYS_SIGMAS)
"""Paths from pure noise to an image, see :func:`particledaps.particles.prior_draws.drawing_path`."""
PATHS: dict[str, Callable[..., torch.Tensor]] = {
    "edm": edm_path,
    "vp": vp_path,
    "vp_scaled": scaled_vp_path,
    "ve": ve_path,
    "cosine": cosine_path,
}
