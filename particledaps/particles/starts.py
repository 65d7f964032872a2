"""Warm starts: a classical solver's images, encoded, where the particles begin instead of pure noise."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from particledaps.checks import SettingsError
from particledaps.operators import fienup
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.particles.state import Start
from particledaps.paths.schedules import first_level_at_most
from particledaps.settings.device import synchronise
from particledaps.settings.hook_keys import HooksAsked, key

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior
    from particledaps.streams import ParticleStreams

PREFIX = "start"
STARTS = ("noise", "hio", "raar")


@dataclass(frozen=True)
class Settings:
    """Where the particles begin; the keys ``start`` and ``start_*``.

    Attributes:
        kind: ``noise``, or the images of a classical solver, encoded and re-noised: ``hio`` or
            ``raar``.
        sigma: the particles of a warm start begin at the first level with at most this sigma.
        restarts: random starts of the solver; the particles take those of lowest residual.
        iterations: iterations of the solver, before 40 of error reduction.
    """

    kind: str = key("noise", words=STARTS, name="start")
    sigma: float = key(3.0, low=0, open_low=True)
    restarts: int = key(8, low=1)
    iterations: int = key(300, low=1)


def conflicts(settings: Settings, asked: HooksAsked) -> Iterator[str]:
    """Sentences on values that exclude each other."""
    if settings.kind != "noise" and settings.restarts < asked.num_samples:
        yield (
            f"start_restarts={settings.restarts}: each of the num_samples={asked.num_samples} particles begins at a "
            "restart of its own"
        )


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


def build_start(settings: Settings, prior: Prior, operator: Operator, path: torch.Tensor) -> WarmStart | None:
    """The warm start that the configuration asks for, or None.

    Raises:
        SettingsError: the operator has no classical solver, or no level of the path is as low as ``start_sigma``.
    """
    if settings.kind == "noise":
        return None
    if not isinstance(operator, PhaseRetrieval):
        raise SettingsError(
            f"start={settings.kind}: there is no classical solver for the operator {operator.name}, only for "
            "phase_retrieval; use start=noise"
        )
    level = first_level_at_most(path, settings.sigma)
    if level is None:
        raise SettingsError(
            f"start_sigma={settings.sigma:g}: no level of the annealing path is that low; the last has "
            f"sigma = {path[-2]:g}"
        )
    solver = fienup.FienupSettings(settings.kind, settings.iterations)
    return WarmStart(prior, operator, solver, settings.restarts, level)
