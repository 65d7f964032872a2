r"""A level's draw from :math:`p(z_0 | z_t, y)`: by a chain, or without one, in latents or in pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from particledaps.diffusion.covariance import BandedCovariance, WhiteCovariance
from particledaps.diffusion.levels import spread
from particledaps.diffusion.mcmc import ChainSettings, Draw, run_chain
from particledaps.diffusion.score import score
from particledaps.particles.data_term import Data, DataTerm, PixelTerm
from particledaps.particles.local_posterior import draw_exactly, local_posterior, run_banded_chain
from particledaps.particles.splitting import minimise_by_splitting

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.operators.phase_retrieval import PhaseRetrieval
    from particledaps.particles.loop_settings import SamplerSettings
    from particledaps.particles.state import Info, State
    from particledaps.priors.prior import Prior


@dataclass(frozen=True)
class LevelPosterior:
    r"""What a level samples: :math:`p(z_0 | z_t, y) \propto p(z_0 | z_t) e^{-L(D(z_0), y) / 2 \tau^2}`.

    Attributes:
        prior: autoencoder and denoiser.
        operator: the measurement operator.
        settings: space, covariance, chain and likelihood.
    """

    prior: Prior
    operator: Operator
    settings: SamplerSettings

    def move(self, state: State, level: int, info: Info) -> State:
        """From ``state.z0_hat`` to ``z0_y`` with its data loss; how far an encoder moved images is logged."""
        settings, prior = self.settings, self.prior
        steps = settings.chain.num_steps if state.mcmc_steps is None else state.mcmc_steps
        chain = replace(settings.chain, step_size=settings.step_size(level), num_steps=steps)
        in_pixels = settings.space == "pixel"
        start = prior.decode(state.z0_hat) if in_pixels else state.z0_hat
        table = settings.covariance
        covariance = None if table is None else table.covariance(state.gate_sigma, start)
        if chain.kernel in ("cg", "admm"):
            around = covariance or WhiteCovariance(state.gate_sigma**2, start)
            x, loss = self._solve(state, level, start, around, chain)
        else:
            x, loss = self._chain(state, level, start, covariance, chain)
        if in_pixels and not prior.is_pixel:
            return self._encoded(state, x, info)
        if prior.redundant:  # parts that are functions of others follow them
            x = prior.encode(prior.decode(x))
        return replace(state, z0_y=x, loss=loss)

    def _chain(
        self,
        state: State,
        level: int,
        start: torch.Tensor,
        covariance: BandedCovariance | None,
        chain: ChainSettings,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the level's chain ends, and the data losses there."""
        settings, prior = self.settings, self.prior
        noise = chain_noise(state, level, start)
        data: Data = DataTerm(prior, self.operator, state.y, settings.gradient_clamp)
        if settings.space == "pixel":
            data = PixelTerm(self.operator, state.y)
        if covariance is not None:
            return run_banded_chain(data, start, covariance, settings.likelihood, chain, *noise)
        exact = settings.prior_term == "exact"
        centre, variance = state.z if exact else start, spread(state.sigma, state.z, prior.parts) ** 2
        prior_score = partial(score, prior.denoiser, sigma=settings.prior_sigma) if exact else None
        return run_chain(
            start, local_posterior(data, centre, variance, settings.likelihood, prior_score), chain, *noise
        )

    def _solve(
        self,
        state: State,
        level: int,
        start: torch.Tensor,
        around: WhiteCovariance | BandedCovariance,
        chain: ChainSettings,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The level's answer without a chain, and its data losses."""
        target = state.y, start, around, self.settings.likelihood, chain.num_steps
        if chain.kernel == "cg":
            return draw_exactly(self.operator, *target, joint_noise(state, level, start, state.y))
        return minimise_by_splitting(cast("PhaseRetrieval", self.operator), *target)

    def _encoded(self, state: State, x: torch.Tensor, info: Info) -> State:
        """Back from images ``x`` to latents; how far the autoencoder moves each image is logged."""
        z0_y = self.prior.encode(x)
        decoded = self.prior.decode(z0_y)
        moved = (decoded - x).square().flatten(1).mean(1).sqrt()
        info.add("encoder", step=state.step, sigma=state.gate_sigma, particle_ids=state.ids, moved=moved.tolist())
        return replace(state, z0_y=z0_y, loss=self.operator.loss(decoded, state.y))


def chain_noise(state: State, level: int, like: torch.Tensor) -> tuple[Draw, Draw]:
    """Normal noise like ``like`` and uniform noise of one level's chain from each particle's own stream."""
    shape = like.shape[1:]
    device, dtype = like.device, like.dtype
    generators = state.streams.generators(state.ids, "mcmc", level, device)
    deciders = state.streams.generators(state.ids, "accept", level, device)

    def normal() -> torch.Tensor:
        return torch.stack([torch.randn(shape, generator=g, device=device, dtype=dtype) for g in generators])

    def uniform() -> torch.Tensor:
        return torch.stack([torch.rand((), generator=g, device=device, dtype=dtype) for g in deciders])

    return normal, uniform


def joint_noise(state: State, level: int, like: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One draw of :func:`chain_noise` for two tensors ``(P, ...)`` at once."""
    normal, _ = chain_noise(state, level, torch.cat([like.flatten(1), other.flatten(1)], 1))
    first, second = normal().split([like[0].numel(), other[0].numel()], dim=1)
    return first.reshape(like.shape), second.reshape(other.shape)
