r"""The minimum of a level's target in phase retrieval, by splitting the amplitudes from the support (ADMM).

.. math:: \min_x \; c \sum (|s| - y)^2 + \tfrac12 (x - m)^T C^{-1} (x - m), \qquad s = F P \left(\tfrac{x + 1}{2}\right)

Each half has a closed form. With the penalty :math:`\rho = 2 c \beta` on the plane and the scaled dual u (Boyd et al.
2011, section 3.1.1; with the support in the place of the trust region these are the classical projections):

.. math:: s &\leftarrow \frac{v}{|v|} \frac{w \bar y + \beta |v|}{w + \beta}, \qquad v = F P x' + u \\
          x &\leftarrow m + \left(\tfrac\rho4 + C^{-1}\right)^{-1} \tfrac\rho2
              \left(P^T F^{-1} (s - u) - \tfrac{m + 1}{2}\right) \\
          u &\leftarrow u + F P x' - s

with x' = (x + 1) / 2 and w the share of each pair of entries that was measured. The problem is not convex: a large beta
comes to a stationary point exactly, a small one near to one, in fewer steps.
"""

from __future__ import annotations

import torch

from particledaps.diffusion.covariance import BandedCovariance, WhiteCovariance
from particledaps.operators.phase_retrieval import PhaseRetrieval

BETA = 1.0
"""Penalty of a disagreement between x and s, as a multiple of the data's own curvature."""


def minimise_by_splitting(
    operator: PhaseRetrieval,
    y: torch.Tensor,
    centre: torch.Tensor,
    covariance: WhiteCovariance | BandedCovariance,
    likelihood: float,
    num_steps: int,
    beta: float = BETA,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A local minimum of the target near its centre, ``(P, C, H, W)``, and its data losses ``(P,)``.

    Args:
        operator: phase retrieval.
        y: ``(P, ...)``.
        centre: m, where it begins.
        covariance: C.
        likelihood: c.
        num_steps: of the splitting, two FFTs each.
        beta: see the module.
    """
    amplitudes, share = operator.half_plane(y).mean, operator.pair_share(y)
    rho = 2 * likelihood * beta
    gain = rho / 2 / (rho / 4 + 1 / covariance.variance)
    x = centre
    seen = operator.spectrum(x)
    dual = torch.zeros_like(seen)
    for _ in range(num_steps):
        split = amplitude_step(seen + dual, amplitudes, share, beta)
        back = operator.back_projection(split - dual, y.shape[-2:], x.shape)
        x = centre + covariance.from_basis(gain * covariance.to_basis(back - (centre + 1) / 2))
        seen = operator.spectrum(x)
        dual = dual + seen - split
    return x, operator.loss(x, y)


def amplitude_step(
    spectrum: torch.Tensor, amplitudes: torch.Tensor, share: torch.Tensor | float, beta: float
) -> torch.Tensor:
    r"""Minimum of :math:`w (|s| - y)^2 + \beta |s - v|^2` over complex s, entry by entry.

    Args:
        spectrum: v.
        amplitudes: y; noise may have made it negative, the length of s stays at least 0.
        share: w, 0 to 1.
        beta: weight of the second term.
    """
    length = spectrum.abs()
    wanted = (share * amplitudes + beta * length).clamp(min=0) / (share + beta)
    return spectrum * (wanted / length.clamp(min=1e-12))
