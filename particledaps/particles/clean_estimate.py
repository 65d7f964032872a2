r"""How far the clean estimate of a prior is from the truth, measured on draws of the prior itself.

.. math:: C(\sigma) = \mathbb{E} \, (x_0 - D(z_0 + \sigma \epsilon)) (x_0 - D(z_0 + \sigma \epsilon))^T

in latents, or between decoded images where the chain runs in pixels. This is the covariance of p(z0 | z_sigma) on
average, around its mean D(z; sigma); DAPS takes :math:`\sigma^2` around the ODE's end instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from particledaps.diffusion.covariance import CovarianceTable, band_matrices
from particledaps.diffusion.solvers import Solver
from particledaps.particles.prior_draws import draw_latents
from particledaps.streams import stream

if TYPE_CHECKING:
    from particledaps.priors.prior import Prior

NUM_DRAWS, NUM_STEPS = 16, 12
NUM_LEVELS, SEED = 16, 0


def measured_covariance(
    prior: Prior,
    path: torch.Tensor,
    in_pixels: bool,
    device: torch.device | str = "cpu",
    z0: torch.Tensor | None = None,
) -> CovarianceTable:
    """The covariance of the prior's clean estimates at the noise levels of an annealing path.

    Args:
        prior: with one noise level for all of its latents.
        path: annealing sigmas ``(K + 1,)``, of which at most :data:`NUM_LEVELS` are measured.
        in_pixels: of decoded estimates.
        device: of the prior.
        z0: clean latents to measure on; None: :data:`NUM_DRAWS` draws from the prior.
    """
    z0 = draw_latents(prior, NUM_DRAWS, SEED, NUM_STEPS, device, Solver("dpmpp2m")) if z0 is None else z0
    truth = prior.decode(z0) if in_pixels else z0
    sigmas = measured_levels(path.tolist())
    matrices = []
    for level, sigma in enumerate(sigmas):
        noise = torch.randn(z0.shape, generator=stream(SEED, level, "covariance")).to(z0)
        with torch.no_grad():
            estimate = prior.denoiser(z0 + sigma * noise, torch.as_tensor(sigma).to(z0))
        estimate = prior.decode(estimate) if in_pixels else estimate
        matrices.append(band_matrices(truth - estimate).cpu())
    shape = prior.image_shape if in_pixels else prior.latent_shape
    return CovarianceTable(sigmas, torch.stack(matrices), shape, truth.std().item())


def measured_levels(path: Sequence[float]) -> list[float]:
    """The noise levels of a path, rising; at most :data:`NUM_LEVELS`, even in log sigma."""
    levels = sorted({sigma for sigma in path if sigma > 0})
    if len(levels) <= NUM_LEVELS:
        return levels
    step = math.log(levels[-1] / levels[0]) / (NUM_LEVELS - 1)
    return [levels[0] * math.exp(step * i) for i in range(NUM_LEVELS)]
