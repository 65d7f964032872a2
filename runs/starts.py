"""Warm starts: a classical solver's images, encoded, where the particles begin instead of pure noise."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from diffusion.paths import first_level_at_most
from operators import fienup
from operators.operator import Operator
from operators.phase_retrieval import PhaseRetrieval
from priors.prior import Prior
from runs.checks import SettingsError
from runs.hook_settings import HookKeys
from runs.phases import synchronise
from runs.rng import ParticleStreams
from state import Start


@dataclass(frozen=True)
class WarmStart:
    """Finds where the particles of one measurement begin.

    Particle p takes the restart with the p-th lowest residual, also where only some of the particles run.

    Attributes:
        prior: encodes the images.
        operator: what measured.
        settings: of the solver.
        restarts: how many starts the solver is given; more than any particle id.
        level: the first level that runs.
    """

    prior: Prior
    operator: PhaseRetrieval
    settings: fienup.FienupSettings
    restarts: int
    level: int

    def __call__(
        self, y: torch.Tensor, streams: ParticleStreams, particle_ids: list[int]
    ) -> tuple[Start, dict[str, Any]]:
        """The start for ``y`` ``(1, C, ...)``, and what the record says of it."""
        synchronise(y.device)
        began = time.perf_counter()
        like = y.expand(self.restarts, *y.shape[1:])
        noise = streams.normal(list(range(self.restarts)), "warm_start", 0, like)
        images, residuals = fienup.solve(self.operator, y, noise, self.prior.image_shape[1:], self.settings)
        order = residuals.argsort(stable=True)
        z0 = self.prior.encode(images[order[particle_ids]])
        synchronise(y.device)
        record = {
            "rule": self.settings.rule,
            "level": self.level,
            "seconds": time.perf_counter() - began,
            "residuals": residuals[order].tolist(),
        }
        return Start(z0, self.level), record


def build_start(keys: HookKeys, prior: Prior, operator: Operator, path: torch.Tensor) -> WarmStart | None:
    """The warm start that the configuration asks for, or None.

    Raises:
        SettingsError: the operator has no classical solver, or no level of the path is as low as ``start_sigma``.
    """
    if keys.start == "noise":
        return None
    if not isinstance(operator, PhaseRetrieval):
        raise SettingsError(
            f"start={keys.start}: there is no classical solver for the operator {operator.name}, only for "
            "phase_retrieval; use start=noise"
        )
    level = first_level_at_most(path, keys.start_sigma)
    if level is None:
        raise SettingsError(
            f"start_sigma={keys.start_sigma:g}: no level of the annealing path is that low; the last has "
            f"sigma = {path[-2]:g}"
        )
    settings = fienup.FienupSettings(keys.start, keys.start_iterations)
    return WarmStart(prior, operator, settings, keys.start_restarts, level)
