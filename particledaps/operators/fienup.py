r"""Classical phase retrieval by alternating projections: hybrid input-output, RAAR and error reduction.

The image, its range [0, 1] taken as known, lies in the unpadded square (the support). With ``P_M`` the projection on
the measured magnitudes and ``P_S`` the one on support and range:

- error reduction: :math:`x \leftarrow P_S P_M x`;
- hybrid input-output (HIO; Fienup 1982): :math:`x \leftarrow P_M x` where ``P_M x`` is feasible, elsewhere
  :math:`x - \beta (P_M x - P_S P_M x)`, which is Fienup's :math:`x - \beta P_M x` outside of the support;
- relaxed averaged alternating reflections (RAAR; Luke 2005):
  :math:`x \leftarrow \beta P_S (2 P_M x - x) + \beta x + (1 - 2 \beta) P_M x`.

Magnitudes do not know where the object lies in the plane: it is kept in the corner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from particledaps.operators.phase_retrieval import PhaseRetrieval, rotate_180

RULES = ("hio", "raar")
BETA = {"hio": 0.9, "raar": 0.87}


@dataclass(frozen=True)
class FienupSettings:
    """How to iterate.

    Attributes:
        rule: ``hio`` or ``raar``.
        iterations: of the rule.
        error_reduction: iterations of error reduction afterwards.
        reduced_support: first and one past the last iteration in which the support is a triangle, half of the square.
            It is no twin of itself, so one twin is favoured (Fienup and Wackerman 1986); its corner changes from
            restart to restart. None: never.
        share: after half of the iterations, start all channels of a restart again from its best one.
    """

    rule: str = "hio"
    iterations: int = 300
    error_reduction: int = 40
    reduced_support: tuple[int, int] | None = (20, 60)
    share: bool = True

    @property
    def beta(self) -> float:
        """Relaxation of the rule."""
        return BETA[self.rule]


def project_magnitudes(x: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """``P_M``: the nearest planes ``(..., H, W)`` with these magnitudes ``(..., H, W // 2 + 1)`` (``rfft2``, ortho).

    A magnitude of NaN was not measured and stays as it is in ``x``.
    """
    spectrum = torch.fft.rfft2(x, norm="ortho")
    real, imaginary = spectrum.real, spectrum.imag
    energy = torch.addcmul(real * real, imaginary, imaginary)
    factor = magnitudes * energy.clamp_(min=1e-24).rsqrt_()
    spectrum *= factor.nan_to_num_(nan=1.0)
    return torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")


def project_support(x: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """``P_S``: clamp to [0, 1] on the support, 0 elsewhere; ``support`` is 1 there and 0 elsewhere."""
    return torch.minimum(x.clamp(min=0), support)


def hybrid_input_output(x: torch.Tensor, y: torch.Tensor, support: torch.Tensor, beta: float) -> torch.Tensor:
    """One step of HIO."""
    projected = project_magnitudes(x, y)
    violation = projected - project_support(projected, support)
    return torch.where(violation == 0, projected, x.sub(violation, alpha=beta))


def relaxed_reflections(x: torch.Tensor, y: torch.Tensor, support: torch.Tensor, beta: float) -> torch.Tensor:
    """One step of RAAR."""
    projected = project_magnitudes(x, y)
    reflected = project_support(2 * projected - x, support)
    return beta * (reflected + x) + (1 - 2 * beta) * projected


def solve(
    operator: PhaseRetrieval, y: torch.Tensor, noise: torch.Tensor, side: tuple[int, int], settings: FienupSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve one measurement from many starts at once.

    The magnitudes are the means of conjugate pairs of ``y``, clamped at 0. Every channel has a twin of its own, so the
    channels of each answer are turned to agree with each other at the end.

    Args:
        operator: what measured.
        y: ``(1, C, ...)`` the measurement.
        noise: ``(R, C, ...)`` planes like ``y`` whose phases are the starts, standard normal.
        side: ``(H, W)`` of the image.
        settings: how to iterate.

    Returns:
        Images ``(R, C, H, W)`` in [-1, 1] and their data losses ``(R,)``, in the order of ``noise``.
    """
    half = operator.half_plane(y)
    magnitudes = torch.where(half.weight > 0, half.mean.clamp(min=0), torch.nan)
    square = _in_corner(torch.ones(side, device=y.device, dtype=y.dtype), y.shape)
    x = _iterate(project_magnitudes(noise, magnitudes), magnitudes, square, side, settings)
    for _ in range(settings.error_reduction):
        x = project_support(project_magnitudes(x, magnitudes), square)
    x = project_support(x, square)
    reference = channel_residuals(x, magnitudes).argmin(1)
    images = 2 * align_channels(x[..., : side[0], : side[1]], reference) - 1
    return images, operator.loss(images, y)


def _iterate(
    x: torch.Tensor, magnitudes: torch.Tensor, square: torch.Tensor, side: tuple[int, int], settings: FienupSettings
) -> torch.Tensor:
    step = hybrid_input_output if settings.rule == "hio" else relaxed_reflections
    first, end = settings.reduced_support or (0, 0)
    reduced = _in_corner(triangles(len(x), side, x.device, x.dtype), x.shape)[:, None]
    for index in range(settings.iterations):
        if settings.share and index == settings.iterations // 2:
            x = share_best_channel(x, magnitudes, square)
        x = step(x, magnitudes, reduced if first <= index < end else square, settings.beta)
    return x


def _in_corner(window: torch.Tensor, plane: torch.Size) -> torch.Tensor:
    return torch.nn.functional.pad(window, (0, plane[-1] - window.shape[-1], 0, plane[-2] - window.shape[-2]))


def triangles(count: int, side: tuple[int, int], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """``(count, H, W)`` halves of the square, 1 inside: the four corners in turn; none meets its own twin."""
    rows = (torch.arange(side[0], device=device) + 0.5) / side[0]
    columns = (torch.arange(side[1], device=device) + 0.5) / side[1]
    corners = []
    for index in range(count):
        across = rows if index % 4 < 2 else rows.flip(0)
        along = columns if index % 2 == 0 else columns.flip(0)
        corners.append(across[:, None] + along < 1 - 1e-6)
    return torch.stack(corners).to(dtype)


def channel_residuals(x: torch.Tensor, magnitudes: torch.Tensor) -> torch.Tensor:
    """How far each channel ``(R, C)`` is from its measured magnitudes, relative to them, on the half plane."""
    found = torch.fft.rfft2(x, norm="ortho").abs()
    return (found - magnitudes).square().nansum((-2, -1)) / magnitudes.square().nansum((-2, -1)).clamp(min=1e-24)


def share_best_channel(x: torch.Tensor, magnitudes: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """Start all channels of a restart again from its channel of lowest residual: colours share their edges."""
    feasible = project_support(project_magnitudes(x, magnitudes), square)
    best = channel_residuals(feasible, magnitudes).argmin(1)
    chosen = feasible[torch.arange(len(x), device=x.device), best]
    return project_magnitudes(chosen[:, None].expand_as(x), magnitudes)


def align_channels(x: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Turn each channel of ``(R, C, H, W)`` where that raises its correlation with the ``reference`` channel ``(R,)``.

    Turning changes the sign of the odd part only, so the odd parts' inner product decides.
    """
    turned = rotate_180(x)
    odd = x - turned
    compared = odd[torch.arange(len(x), device=x.device), reference][:, None]
    against = (odd * compared).sum((-2, -1), keepdim=True) < 0
    return torch.where(against, turned, x)
