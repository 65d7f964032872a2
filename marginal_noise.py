r"""The noise level of a measurement that does not show it (``task.noise_sigma=auto``), beside its image.

With an unknown noise level the likelihood of m independent entries is, up to a constant,

.. math:: -\log p(y | x) = \frac m2 \log L(x), \qquad \sigma^2 = L(x) / m \text{ at its maximum,}

so a short annealing takes as tau of each level what the answers of the level before miss. What it ends with is the
*effective* noise level: what the prior's decoder cannot say counts as noise. Where the noise is small, that is most of
it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from particledaps.diffusion.chain_measures import largest_curvature
from particledaps.diffusion.covariance import CovarianceTable
from particledaps.diffusion.mcmc import ChainSettings
from particledaps.particles.clean_estimate import measured_covariance
from particledaps.particles.data_term import PixelTerm
from particledaps.particles.prior_draws import largest_sigma
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams, stream
from sampler import Info, LatentDAPS, SamplerSettings
from tuning import CURVATURE_STEPS, MOMENTUM, SEED, STEP, kernel_for

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior

NUM_PARTICLES, NUM_LEVELS = 4, 24
SIGMA_MAX, SIGMA_MIN = 10.0, 0.05
STEPS = {"cg": 30, "admm": 12, "hmc": 30}


def independent_entries(operator: Operator, y: torch.Tensor) -> tuple[float, float]:
    """How many entries of ``y`` ``(1, ...)`` noise is told by, and the loss that no image changes.

    The operator's noise floor is the second plus the first times the noise's variance. Conjugate pairs count once.
    """
    at_one, at_two = (operator.with_noise(sigma).noise_floor(y).mean.item() for sigma in (1.0, 2.0))
    count = (at_two - at_one) / 3
    return count, at_one - count


@dataclass(frozen=True)
class NoisePilot:
    """Estimates the effective noise level of measurements, a short annealing of a few particles each.

    Attributes:
        prior: with one noise level for all of its latents.
        device: of the prior.
        seed: of the annealing.
    """

    prior: Prior
    device: torch.device
    seed: int = SEED

    @cached_property
    def path(self) -> torch.Tensor:
        """Of the annealing."""
        return edm_path(NUM_LEVELS, min(SIGMA_MAX, largest_sigma(self.prior)), SIGMA_MIN)

    @cached_property
    def covariance(self) -> CovarianceTable:
        """Of the prior's clean estimates; measured once."""
        return measured_covariance(self.prior, self.path, True, self.device)

    def __call__(self, operator: Operator, y: torch.Tensor, image_id: int = 0) -> float:
        """Effective noise level of ``y`` ``(1, ...)``, from the particle that misses least.

        Raises:
            ValueError: nothing finite came out, or all entries are equal.
        """
        if not y.std().item() > 0:
            raise ValueError("all of its entries are equal")
        count, constant = independent_entries(operator, y)
        kernel = kernel_for(operator)
        stiffness = 1.0
        if kernel == "hmc":
            data, zero = PixelTerm(operator, y), y.new_zeros(1, *self.prior.image_shape)
            at = stream(self.seed, image_id, "curvature")
            stiffness = largest_curvature(lambda x: data(x, True)[1], zero, CURVATURE_STEPS, at).item()
        tau = y.std().item()
        settings = SamplerSettings(
            path=self.path,
            inner_path=lambda sigma: torch.tensor([sigma, 0.0], dtype=torch.float64),
            chain=ChainSettings(kernel, STEPS[kernel], 0.0, MOMENTUM),
            step_size_min_ratio=1.0,
            tau=tau,
            space="pixel",
            covariance=self.covariance,
        )
        loop = LatentDAPS(self.prior, operator, settings)
        state, info = loop.start(y, ParticleStreams(self.seed, image_id), range(NUM_PARTICLES)), Info()
        for _ in range(settings.num_levels):
            step = STEP * 2 * tau**2 / max(stiffness, 1e-12)
            own = replace(settings, tau=tau, chain=replace(settings.chain, step_size=step))
            state = next(LatentDAPS(self.prior, operator, own).levels(state, info))
            losses = state.loss[state.active]
            if not len(losses):
                raise ValueError("every particle diverged")
            tau = max((losses.min().item() - constant) / count, 1e-12) ** 0.5
        return tau
