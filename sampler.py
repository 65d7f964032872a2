r"""Decoupled annealing posterior sampling (DAPS, Zhang et al. 2024) over a batch of particles of one measurement.

At every level ``sigma_k`` of the annealing path:

1. the probability-flow ODE takes ``z`` to a clean estimate ``z0_hat``;
2. MCMC from ``z0_hat`` samples :math:`p(z_0 | z_t, y) \propto p(z_0 | z_t) e^{-L(D(z_0), y) / 2 \tau^2}` to ``z0_y``;
3. ``z0_y`` is re-noised to ``sigma_{k+1}``.

Hooks see and may replace the :class:`State` at three moments of each level and at two after the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from particledaps.diffusion.covariance import BandedCovariance, CovarianceTable, WhiteCovariance
from particledaps.diffusion.levels import broadcast_sigma, per_particle, spread
from particledaps.diffusion.mcmc import ChainSettings, Draw, run_chain
from particledaps.diffusion.pfode import DiffusionPFODE
from particledaps.diffusion.score import score
from particledaps.particles.data_term import DataTerm, PixelTerm
from particledaps.particles.local_posterior import draw_exactly, local_posterior, run_banded_chain
from particledaps.particles.splitting import minimise_by_splitting
from particledaps.particles.state import NUM_TIMESTEPS, Hook, Info, Start, State, Streams
from particledaps.paths.schedules import PATHS

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior
    from particledaps.settings.schema import AnnealingSettings, ChainConfig, CompatSettings, OdeSettings

__all__ = ["DAPS", "Hook", "Info", "LatentDAPS", "SamplerSettings", "Start", "State", "Streams"]


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
    annealing: AnnealingSettings, ode: OdeSettings, chain: ChainConfig, compat: CompatSettings, is_pixel: bool = False
) -> SamplerSettings:
    """Paths, chain and likelihood of the annealing loop, from values without nulls.

    A pixel prior has no gradients clamped (as in DAPS).
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


def check_path(path: torch.Tensor, prior: Prior, one_level: bool = False) -> None:
    """An annealing path has one column, or (unless ``one_level``) one a part of the prior, and noise before its end.

    Raises:
        ValueError: it has not.
    """
    if one_level and path.ndim != 1:
        raise ValueError("a chain in pixels or with a measured covariance takes one noise level for all parts")
    columns, parts = path.shape[1:].numel(), max(len(prior.parts), 1)
    if path.ndim not in (1, 2) or (path.ndim == 2 and columns != parts):
        raise ValueError(f"the path has {columns} columns, {prior.name} has {parts} parts with noise of their own")
    if not bool((path[:-1] > 0).all()):
        raise ValueError("the path is 0 before its end: hold a part at a small sigma instead")


def _held_below(least: float, path: Callable[[float], torch.Tensor], sigma: float, num_steps: int) -> torch.Tensor:
    """The ODE's path of one part; a part that already stands below the ODE's smallest sigma stays until the end."""
    if sigma > least:
        return path(sigma)
    return torch.tensor([sigma] * num_steps + [0.0], dtype=torch.float64)


class LatentDAPS:
    """The annealing loop. With a pixel prior (identity autoencoder) this is DAPS itself.

    Args:
        prior: autoencoder and denoiser.
        operator: the measurement operator.
        settings: path, chain and likelihood.
        hooks: called in this order at each moment.
        first_child_id: least particle id of a child; one after the largest of the first particles if that is more.

    Raises:
        ValueError: the path does not fit the prior, see :func:`check_path`.
    """

    def __init__(
        self,
        prior: Prior,
        operator: Operator,
        settings: SamplerSettings,
        hooks: Sequence[Hook] = (),
        first_child_id: int = 0,
    ) -> None:
        check_path(settings.path, prior, settings.space == "pixel" or settings.covariance is not None)
        self.first_child_id = first_child_id
        self.prior = prior
        self.operator = operator
        self.settings = settings
        self.hooks = tuple(hooks)
        self.ode = DiffusionPFODE(prior.denoiser, settings.solver, prior.parts)

    def start(
        self,
        y: torch.Tensor,
        streams: Streams,
        particle_ids: Sequence[int],
        start: Start | None = None,
    ) -> State:
        """Particles of pure noise at ``path[0]`` for one measurement ``y`` ``(1, ...)``, or where ``start`` says."""
        count, ids = len(particle_ids), torch.as_tensor(list(particle_ids), device=y.device)
        like = y.new_zeros(count, *self.prior.latent_shape)
        level = 0 if start is None else start.level
        z = spread(self.settings.sigma(level), like, self.prior.parts) * streams.normal(
            list(particle_ids), "start", 0, like
        )
        z0 = torch.zeros_like(z) if start is None else start.z0.to(z)
        z = z if start is None else z0 + z
        return State(
            z=z,
            z0_hat=z0,
            z0_y=z0,
            y=y.expand(count, *y.shape[1:]),
            loss=y.new_zeros(count),
            particle_id=ids,
            parent_id=torch.full_like(ids, -1),
            diverged=torch.zeros_like(ids, dtype=torch.bool),
            masked=torch.zeros_like(ids, dtype=torch.bool),
            level=torch.full_like(ids, level),
            next_id=max(self.first_child_id, *(i + 1 for i in particle_ids)),
            streams=streams,
            gate_part=self.settings.gate_part,
        )

    def sample(
        self,
        y: torch.Tensor,
        streams: Streams,
        particle_ids: Sequence[int],
        info: Info | None = None,
        start: Start | None = None,
    ) -> State:
        """Run the levels from ``start`` on; the answer is the last state's ``z0_y``.

        Args:
            y: one measurement ``(1, ...)``.
            streams: random streams of this image.
            particle_ids: the particles to run.
            info: holds what hooks log.
            start: where they begin; None: as pure noise.
        """
        hooks = [hook.fresh() for hook in self.hooks]
        own = type(self)(self.prior, self.operator, self.settings, hooks, self.first_child_id)
        state = self.start(y, streams, particle_ids, start)
        return own._run(state, Info() if info is None else info)

    def _run(self, state: State, info: Info) -> State:
        while bool((state.level < self.settings.num_levels).any()):
            for after_level in self.levels(state, info):
                state = after_level
            state = self._call("after_levels", state, info)
            if bool((state.level < self.settings.num_levels).any()):
                state = self._renoise(state)
        return self._call("at_end", state, info)

    def levels(self, state: State, info: Info) -> Iterator[State]:
        """Yield the state after each level, re-noised to the next one.

        The particles furthest from the end go first; the others wait.
        """
        while (level := int(state.level.min())) < self.settings.num_levels:
            here = state.level == level
            if bool(here.all()):
                state = self._level(state, level, info)
            else:
                state = state[~here].join(self._level(state[here], level, info))
            yield state

    def _level(self, state: State, level: int, info: Info) -> State:
        settings = self.settings
        time = NUM_TIMESTEPS * (settings.num_levels - level) / settings.num_levels
        state = replace(state, step=level, sigma=settings.sigma(level), t=time, drift=None, mcmc_steps=None)
        state = self._call("before_ode", state, info)
        before = state
        state = self._mcmc(self._ode(state), level, info)
        state = self._call("after_mcmc", freeze_diverged(before, state), info)
        state = replace(state, level=torch.full_like(state.level, level + 1))
        return self._renoise(fall_back(self._call("before_renoise", state, info)))

    def _renoise(self, state: State) -> State:
        levels, all_ids = state.level.tolist(), state.ids
        sigma = self.settings.path[levels].to(state.z)
        noise = torch.empty_like(state.z)
        for level in set(levels):
            rows = [i for i, own in enumerate(levels) if own == level]
            ids = [all_ids[i] for i in rows]
            noise[rows] = state.streams.normal(ids, "renoise", level - 1, state.z)
        return replace(state, z=state.z0_y + broadcast_sigma(sigma, state.z, self.prior.parts) * noise)

    def _ode(self, state: State) -> State:
        if state.drift is not None:
            self.ode.set_repulsion(*state.drift)
        try:
            with torch.no_grad():
                z0_hat = self.ode.solve(state.z, self.settings.inner_path(state.sigma))
        finally:
            self.ode.clear_repulsion()
        return replace(state, z0_hat=z0_hat)

    def _mcmc(self, state: State, level: int, info: Info) -> State:
        settings, prior = self.settings, self.prior
        steps = settings.chain.num_steps if state.mcmc_steps is None else state.mcmc_steps
        chain = replace(settings.chain, step_size=settings.step_size(level), num_steps=steps)
        in_pixels = settings.space == "pixel"
        start = prior.decode(state.z0_hat) if in_pixels else state.z0_hat
        covariance = settings.covariance and settings.covariance.covariance(state.gate_sigma, start)
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
        data = (
            PixelTerm(self.operator, state.y)
            if settings.space == "pixel"
            else DataTerm(prior, self.operator, state.y, settings.gradient_clamp)
        )
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
        target = self.operator, state.y, start, around, self.settings.likelihood, chain.num_steps
        if chain.kernel == "cg":
            return draw_exactly(*target, joint_noise(state, level, start, state.y))
        return minimise_by_splitting(*target)

    def _encoded(self, state: State, x: torch.Tensor, info: Info) -> State:
        """Back from images ``x`` to latents; how far the autoencoder moves each image is logged."""
        z0_y = self.prior.encode(x)
        decoded = self.prior.decode(z0_y)
        moved = (decoded - x).square().flatten(1).mean(1).sqrt()
        info.add("encoder", step=state.step, sigma=state.gate_sigma, particle_ids=state.ids, moved=moved.tolist())
        return replace(state, z0_y=z0_y, loss=self.operator.loss(decoded, state.y))

    def _call(self, moment: str, state: State, info: Info) -> State:
        for hook in self.hooks:
            state = getattr(hook, moment)(state, info)
        return state


DAPS = LatentDAPS
"""Pixel DAPS: the same loop with a prior whose autoencoder is the identity."""


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


def freeze_diverged(before: State, after: State) -> State:
    """Put particles that are not finite, or were not before, back to their values of ``before`` and mark them."""
    parts = (after.z0_hat, after.z0_y, after.loss[:, None])
    finite = torch.stack([part.flatten(1).isfinite().all(1) for part in parts]).all(0)
    diverged = before.diverged | ~finite

    def choose(name: str) -> torch.Tensor:
        new, old = getattr(after, name), getattr(before, name)
        return torch.where(per_particle(diverged, new), old, new)

    return replace(after, diverged=diverged, **{name: choose(name) for name in ("z0_hat", "z0_y", "loss")})


def fall_back(state: State) -> State:
    """After the hooks: particles whose ``z0_y`` is not finite fall back to ``z0_hat`` and are marked."""
    broken = ~state.z0_y.flatten(1).isfinite().all(1)
    z0_y = torch.where(per_particle(broken, state.z0_y), state.z0_hat, state.z0_y)
    return replace(state, z0_y=z0_y, diverged=state.diverged | broken)
