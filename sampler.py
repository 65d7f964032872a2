r"""Decoupled annealing posterior sampling (DAPS, Zhang et al. 2024) over a batch of particles of one measurement.

At every level ``sigma_k`` of the annealing path:

1. the probability-flow ODE takes ``z`` to a clean estimate ``z0_hat``;
2. MCMC from ``z0_hat`` samples :math:`p(z_0 | z_t, y) \propto p(z_0 | z_t) e^{-L(D(z_0), y) / 2 \tau^2}` to ``z0_y``;
3. ``z0_y`` is re-noised to ``sigma_{k+1}``.

Hooks see and may replace the :class:`State` at three moments of each level and at two after the last one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from particledaps.diffusion.levels import broadcast_sigma, per_particle, spread
from particledaps.diffusion.pfode import DiffusionPFODE
from particledaps.particles.level_posterior import LevelPosterior
from particledaps.particles.loop_settings import SamplerSettings, build_sampler_settings
from particledaps.particles.state import NUM_TIMESTEPS, Hook, Info, Start, State, Streams

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior

__all__ = [
    "DAPS",
    "Hook",
    "Info",
    "LatentDAPS",
    "SamplerSettings",
    "Start",
    "State",
    "Streams",
    "build_sampler_settings",
]


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
        self.level_posterior = LevelPosterior(prior, operator, settings)
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
        state = self.level_posterior.move(self._ode(state), level, info)
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

    def _call(self, moment: str, state: State, info: Info) -> State:
        for hook in self.hooks:
            state = getattr(hook, moment)(state, info)
        return state


DAPS = LatentDAPS
"""Pixel DAPS: the same loop with a prior whose autoencoder is the identity."""


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
