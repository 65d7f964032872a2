"""How the annealing loop runs: its path, the chain of a level, the likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from particledaps.diffusion.covariance import CovarianceTable
from particledaps.diffusion.mcmc import ChainSettings
from particledaps.paths.schedules import PATHS

if TYPE_CHECKING:
    from particledaps.settings.schema import CompatSettings


@dataclass(frozen=True)
class SamplerSettings:
    r"""How the annealing loop runs.

    Attributes:
        path: ``(K + 1,)`` annealing sigmas, the last one 0; ``(K + 1, S)`` where S parts have levels of their own.
        inner_path: ``inner_path(sigma)`` gives the ODE's path from ``sigma`` (a number, or ``(1, S)``) down.
        chain: the MCMC chain at step size ``chain.step_size`` (first level).
        step_size_min_ratio: the step size falls linearly over the levels to this fraction.
        tau: standard deviation of the likelihood; the operator's noise is calibrated, less is tempering.
        prior_term: ``gaussian`` for ``N(z0_hat, sigma^2)`` (DAPS; biased, see PROJECT.md) or ``exact`` for
            ``p(z0) N(z_t; z0, sigma^2)``.
        prior_sigma: sigma at which ``exact`` evaluates the prior's score.
        solver: ODE solver.
        likelihood_half: data term ``L / (2 tau^2)``; False is DAPS's ``L / tau^2``.
        gradient_clamp: if set, the latent gradient of the loss is clamped elementwise (DAPS's latent wrapper: 1.0).
        ratio_counts_end: step-size schedule ``k / (K + 1)`` as in DAPS instead of ``k / (K - 1)``.
        gate_part: the part whose noise level hooks go by.
        space: where the chain runs: ``latent``, or ``pixel``: from the decoded clean estimate, and back by the encoder.
        covariance: of the clean estimate in that space; None: :math:`\sigma^2` of every element. With it ``inner_path``
            should be one step to 0: the estimate then is the posterior mean D(z; sigma) that the covariance is about.
    """

    path: torch.Tensor
    inner_path: Callable[[Any], torch.Tensor]
    chain: ChainSettings
    step_size_min_ratio: float
    tau: float
    prior_term: str = "gaussian"
    prior_sigma: float = 0.01
    solver: str = "euler"
    likelihood_half: bool = True
    gradient_clamp: float | None = None
    ratio_counts_end: bool = False
    gate_part: int = 0
    space: str = "latent"
    covariance: CovarianceTable | None = None

    @property
    def num_levels(self) -> int:
        return len(self.path) - 1

    @property
    def likelihood(self) -> float:
        """Factor of the data loss in the potential."""
        return 1 / ((2 if self.likelihood_half else 1) * self.tau**2)

    @property
    def gate_path(self) -> torch.Tensor:
        """``(K + 1,)``: the sigmas that hooks go by."""
        return self.path[:, self.gate_part] if self.path.ndim == 2 else self.path

    def sigma(self, level: int) -> float | torch.Tensor:
        """Noise of a level: a number, or ``(1, S)``."""
        return self.path[level][None] if self.path.ndim == 2 else self.path[level].item()

    def step_size(self, level: int) -> float:
        """Step size of the chain at ``level``."""
        last = self.num_levels + 1 if self.ratio_counts_end else max(self.num_levels - 1, 1)
        return self.chain.step_size * (1 + level / last * (self.step_size_min_ratio - 1))


def build_sampler_settings(
    annealing: Any, ode: Any, chain: Any, compat: CompatSettings, is_pixel: bool = False
) -> SamplerSettings:
    """Paths, chain and likelihood of the annealing loop.

    Args:
        annealing: :class:`particledaps.settings.schema.AnnealingSettings` without nulls.
        ode: :class:`particledaps.settings.schema.OdeSettings` without nulls.
        chain: :class:`particledaps.settings.schema.ChainConfig` without nulls, but for its limit.
        compat: switches to DAPS's behaviour.
        is_pixel: a pixel prior has no gradients clamped (as in DAPS).
    """
    path = PATHS[annealing.schedule](annealing.num_steps, annealing.sigma_max, annealing.sigma_min)

    def inner_path(sigma: float | torch.Tensor) -> torch.Tensor:
        if chain.covariance == "measured":
            return torch.tensor([sigma, 0.0], dtype=torch.float64)  # one Euler step to 0: the posterior mean
        if isinstance(sigma, torch.Tensor):
            return torch.stack(
                [_held_below(ode.sigma_min, inner_path, own, ode.num_steps) for own in sigma[0].tolist()], 1
            )
        return PATHS[ode.schedule](ode.num_steps, sigma, ode.sigma_min, end=compat.inner_end)

    return SamplerSettings(
        path=path,
        inner_path=inner_path,
        chain=ChainSettings(chain.kernel, chain.num_steps, chain.step_size, chain.momentum, chain.curvature_limit),
        step_size_min_ratio=chain.step_size_min_ratio,
        tau=chain.tau,
        prior_term=chain.prior,
        prior_sigma=chain.prior_sigma,
        solver=ode.solver,
        likelihood_half=compat.likelihood_half,
        gradient_clamp=None if is_pixel else compat.gradient_clamp,
        ratio_counts_end=compat.ratio_counts_end,
        space=chain.space,
    )


def _held_below(least: float, path: Callable[[float], torch.Tensor], sigma: float, num_steps: int) -> torch.Tensor:
    """The ODE's path of one part; a part that already stands below the ODE's smallest sigma stays until the end."""
    if sigma > least:
        return path(sigma)
    return torch.tensor([sigma] * num_steps + [0.0], dtype=torch.float64)
