r"""Hook: late in the annealing, particles of high loss give way to copies of those of low loss.

The weights :math:`w_i \propto e^{-\beta (L_i - \min L) / 2 \tau^2}` are tempered: with ``beta = 1`` a single particle
would take all, so ``beta`` is chosen such that the effective sample size :math:`1 / \sum w_i^2` is half of the
particles. Copies part from their parents at the next re-noising, which their own random streams drive.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from particledaps.checks import SettingsError
from particledaps.particles.state import Hook, Info, State
from particledaps.settings.hook_keys import HooksAsked, key
from particledaps.streams import SHARED

if TYPE_CHECKING:
    from particledaps.particles.hook_setup import Setup

PREFIX = "resample"
KEPT = 2
"""Lineages that are never given up."""
LATEST = 1.0
"""Earlier a wrong basin often has the lowest loss, and its copies would take over."""


@dataclass(frozen=True)
class Settings:
    """When copies are made; the keys ``resample_*``.

    Attributes:
        sigma: resample at levels with at most this sigma, 0 is off; 0.5 is recommended.
        sigma_min: and at least this one.
    """

    sigma: float = key(0.0)
    sigma_min: float = key(0.2, low=0)


def conflicts(settings: Settings, asked: HooksAsked) -> Iterator[str]:
    """Sentences on values that exclude each other."""
    sigma = settings.sigma
    least = settings.sigma_min
    pruning = asked["pruning"]
    if not 0 <= sigma <= LATEST:
        yield (
            f"resample_sigma={sigma:g}: must be at least 0 (off) and at most 1: earlier a wrong basin often has the "
            "lowest loss, and its copies would take over; 0.5 is recommended"
        )
        return
    if sigma == 0:
        return
    if least > sigma:
        yield f"resample_sigma_min={least:g}: must not exceed resample_sigma={sigma:g}"
    if asked.num_samples <= KEPT:
        yield (
            f"resample_sigma={sigma:g}: two lineages are always kept, so num_samples={asked.num_samples} leaves "
            "nothing to resample; use num_samples=3 or more"
        )
    if pruning.step >= 0 and pruning.keep <= KEPT and pruning.branch == 0:
        yield (
            f"resample_sigma={sigma:g}: pruning_keep={pruning.keep} leaves no more than two particles, which are "
            "always kept; use pruning_keep=3 or more, or pruning_branch"
        )


def build(settings: Settings, setup: Setup) -> Resampling | None:
    """The hook; None if it is off.

    Raises:
        SettingsError: no level lies between the sigmas.
    """
    if settings.sigma <= 0:
        return None
    pruned, last_level = setup.level_at(setup.asked["pruning"].step), setup.num_levels - 1
    from_level, sigmas = 0 if pruned is None else pruned + 1, setup.path[:-1].tolist()
    levels = range(max(from_level, setup.first_level), last_level)
    if not any(settings.sigma_min <= sigmas[k] <= settings.sigma for k in levels):
        raise SettingsError(
            f"resample_sigma={settings.sigma:g}, resample_sigma_min={settings.sigma_min:g}: no level lies there, after "
            f"pruning and before the last one (sigma = {sigmas[-1]:g}); widen the range"
        )
    return Resampling(settings, setup.operator.noise_sigma, last_level, from_level)


def record(settings: Settings, hook: Resampling | None, info: Info, particle_ids: list[int]) -> dict[str, Any]:
    """What was copied of one image."""
    on = settings.sigma > 0
    return {"resampling": {"per_step": info.rows.get("resampling", [])} if on else None}


def tempered_weights(energies: list[float], beta: float) -> list[float]:
    """Weights proportional to ``exp(-beta (E - min E))``, which sum to 1."""
    lowest = min(energies)
    raw = [math.exp(-beta * (energy - lowest)) for energy in energies]
    return [value / sum(raw) for value in raw]


def effective_sample_size(weights: list[float]) -> float:
    """``1 / sum w^2``: the number of equal weights that scatter as much."""
    return 1 / sum(w * w for w in weights)


def choose_beta(energies: list[float], target: float) -> float:
    """The ``beta`` in [0, 1] whose weights have the effective sample size ``target``, by bisection.

    1 where no ``beta`` below gets so low.
    """
    if effective_sample_size(tempered_weights(energies, 1.0)) >= target:
        return 1.0
    low, high = min(1e-6 / (max(energies) - min(energies)), 0.5), 1.0  # weights are equal at low
    for _ in range(100):
        middle = math.sqrt(low * high)
        enough = effective_sample_size(tempered_weights(energies, middle)) >= target
        low, high = (middle, high) if enough else (low, middle)
    return low


def systematic_counts(weights: list[float], uniform: float) -> list[int]:
    """How often each of N particles is drawn at the N points ``(uniform + n) / N``; ``N w`` on average."""
    count = len(weights)
    total = sum(weights)
    edges = [0]
    reached = 0.0
    for weight in weights[:-1]:
        reached += weight / total * count
        edges.append(min(max(math.ceil(reached - uniform), 0), count))
    edges.append(count)
    return [end - start for start, end in itertools.pairwise(edges)]


def keep_two_lineages(counts: list[int], losses: list[float], roots: list[int]) -> list[int]:
    """The counts, changed so that the particle of lowest loss and the best one of another root are both drawn.

    Args:
        counts: of each particle.
        losses: of each particle.
        roots: what each particle descends from; if all from one, every particle counts as a root.
    """
    order = sorted(range(len(losses)), key=lambda i: (losses[i], i))
    others = [i for i in order[1:] if roots[i] != roots[order[0]]] or order[1:]
    kept, counts = [order[0], *others[:1]], list(counts)
    for needed in kept:
        if counts[needed] == 0:
            spare = [i for i in order if counts[i] > (1 if i in kept else 0)]
            counts[max(spare, key=lambda i: (counts[i], losses[i]))] -= 1
            counts[needed] = 1
    return counts


class Resampling(Hook):
    """Systematic resampling between ``settings.sigma`` and ``settings.sigma_min``.

    Args:
        settings: when.
        noise_sigma: standard deviation of the measurement noise.
        last_level: the run's last level; nothing would part copies there, so it does not resample.
        from_level: the first level that may resample (pruning comes first).
    """

    def __init__(self, settings: Settings, noise_sigma: float, last_level: int, from_level: int = 0) -> None:
        self.settings, self.noise_sigma = settings, noise_sigma
        self.last_level, self.from_level = last_level, from_level
        self.roots: dict[int, int] = {}

    def fresh(self) -> Resampling:
        """One that has seen no lineage."""
        new = copy(self)
        new.roots = {}
        return new

    def before_renoise(self, state: State, info: Info) -> State:
        """Resample the particles that are neither diverged nor masked."""
        settings = self.settings
        self._note_lineages(state)
        late = settings.sigma_min <= state.gate_sigma <= settings.sigma and state.step != self.last_level
        if not late or state.step < self.from_level:
            return state
        rows = (state.active & state.loss.isfinite()).nonzero().flatten().tolist()
        return self._resample(state, rows, info) if len(rows) > KEPT else state

    def _resample(self, state: State, rows: list[int], info: Info) -> State:
        ids = [state.ids[i] for i in rows]
        losses = state.loss[rows].tolist()
        energies = [loss / (2 * self.noise_sigma**2) for loss in losses]
        beta = choose_beta(energies, len(rows) / 2)
        weights = tempered_weights(energies, beta)
        drawn = systematic_counts(weights, self._uniform(state))
        counts = keep_two_lineages(drawn, losses, [self.roots.get(i, i) for i in ids])
        parents = [i for i, count in enumerate(counts) for _ in range(count - 1)]
        freed = [i for i, count in enumerate(counts) if count == 0]
        children = state.children([rows[i] for i in parents])
        info.add(
            "resampling",
            step=state.step,
            sigma=state.gate_sigma,
            t=state.t,
            particle_ids=ids,
            losses=losses,
            beta=beta,
            weights=weights,
            effective_sample_size=effective_sample_size(weights),
            counts=counts,
            copied=[birth | {"replaced": ids[f]} for birth, f in zip(children.births, freed, strict=True)],
        )
        return self._put(state, children, [rows[i] for i in freed])

    def _uniform(self, state: State) -> float:
        stream = [SHARED], "resample", state.step, torch.device("cpu")
        (generator,) = state.streams.generators(*stream)
        return torch.rand((), generator=generator, dtype=torch.float64).item()

    def _put(self, state: State, children: State, freed: list[int]) -> State:
        """Each child into the place of the particle in one of the rows ``freed``."""
        index = list(range(len(state)))
        for n, place in enumerate(freed):
            index[place] = len(state) + n
        state = state.join(children)[index]
        self._note_lineages(state)
        return state

    def _note_lineages(self, state: State) -> None:
        """Whom each child descends from, be it a copy of ours or a child of a pruning."""
        for child, parent in sorted(zip(state.ids, state.parent_id.tolist(), strict=True)):
            if parent >= 0 and child not in self.roots:
                self.roots[child] = self.roots.get(parent, parent)
