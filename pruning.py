"""Hook: once, at a chosen level, drop particles and perhaps branch children from the survivors.

Pruning looks at the data loss of the decoded ``z0_y`` and at the distance of the images themselves, without
alignment, so that both twins of a phase retrieval count as different and may both survive. Children follow
tree-guided diffusion planning (Jeon et al. 2025): a survivor is re-noised to a middle sigma and annealed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from particledaps.particles.data_term import Expected, expected_loss
from particledaps.particles.state import Hook, Info, State
from particledaps.paths.schedules import first_level_at_most
from particledaps.settings.hook_keys import HooksAsked, key

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.particles.hook_setup import Setup
    from particledaps.priors.prior import Prior

PREFIX = "pruning"
RULES = ("loss", "diverse")
MODES = ("slice", "mask")


@dataclass(frozen=True)
class Settings:
    """When particles are dropped, and which stay; the keys ``pruning_*``.

    Attributes:
        step: prune at the end of the first level with ``t <= step`` (0 to 1000), -1 is off.
        keep: number of particles to keep at most.
        rule: ``loss`` keeps the lowest losses; ``diverse`` drops the worse of a close pair, and keeps a far one only
            while its loss is within ``tolerance`` of the loss expected at the answer (or of the best, if that is more).
        mode: ``slice`` removes particles and frees their memory and time; ``mask`` lets them run on unseen.
        tolerance: of ``diverse``, in standard deviations of the loss at the answer.
        close: of ``diverse``: root-mean-square distance of two images in [0, 1] below which they are one.
        branch: fill the freed places with children of the survivors, re-noised to the first sigma of the path that is
            at most this; 0 is off.
    """

    step: int = key(-1, low=-1, high=1000)
    keep: int = key(2, low=1)
    rule: str = key("loss", words=RULES)
    mode: str = key("slice", words=MODES)
    tolerance: float = key(3.0, low=0)
    close: float = key(0.1, low=0)
    branch: float = key(0.0, low=0)


def conflicts(settings: Settings, asked: HooksAsked) -> Iterator[str]:
    """Sentences on values that exclude each other."""
    if settings.branch > 0 and settings.mode == "mask":
        yield "pruning_branch: a masked particle keeps its place; branching needs pruning_mode=slice"
    if settings.step >= 0 and settings.keep > asked.num_samples:
        yield f"pruning_keep={settings.keep}: there are only num_samples={asked.num_samples} particles"


def build(settings: Settings, setup: Setup) -> Pruning | None:
    """The hook; None if it is off."""
    if setup.level_at(settings.step) is None:
        return None
    return Pruning(setup.prior, setup.operator, settings, setup.path, setup.level_at(settings.step))


def record(settings: Settings, hook: Pruning | None, info: Info, particle_ids: list[int]) -> dict[str, Any]:
    """What was dropped of one image."""
    return {"pruning": next(iter(info.rows.get("pruning", [])), None)}


def image_distances(x: torch.Tensor) -> torch.Tensor:
    """Root-mean-square distances ``(P, P)`` of images ``(P, C, H, W)`` in [-1, 1], measured in [0, 1]."""
    flat = (x / 2).flatten(1)
    return (flat[:, None] - flat[None]).square().mean(-1).sqrt()


def keep_lowest(losses: list[float], keep: int) -> list[int]:
    """Positions of the ``keep`` lowest losses, best first; NaN and infinity last."""
    order = sorted(range(len(losses)), key=lambda i: (not losses[i] < float("inf"), losses[i], i))
    return order[:keep]


def keep_diverse(losses: list[float], distances: list[list[float]], keep: int, limit: float, close: float) -> list[int]:
    """Positions to keep, best first: each far from those before it, with a loss of at most ``limit``.

    Args:
        losses: of each particle.
        distances: of each pair.
        keep: at most so many; at least 1.
        limit: largest loss of all but the best.
        close: pairs nearer than this are one.
    """
    order = keep_lowest(losses, len(losses))
    kept = order[:1]
    for i in order[1:]:
        far = all(distances[i][j] >= close for j in kept)
        if len(kept) < keep and far and losses[i] <= limit:
            kept.append(i)
    return kept


class Pruning(Hook):
    """Fires once, at the end of ``at_level``.

    Args:
        prior: decodes the particles.
        operator: measures them.
        settings: what to keep.
        path: annealing sigmas ``(K + 1,)``.
        at_level: level at whose end particles are dropped.
        expected: gives the loss that is expected at the answer to a measurement; its standard deviation is the unit of
            the tolerance.
    """

    def __init__(
        self,
        prior: Prior,
        operator: Operator,
        settings: Settings,
        path: torch.Tensor,
        at_level: int,
        expected: Callable[[Prior, Operator, torch.Tensor], Expected] = expected_loss,
    ) -> None:
        self.prior = prior
        self.operator = operator
        self.settings = settings
        self.at_level = at_level
        self.expected = expected
        reached = first_level_at_most(path, settings.branch)
        self.branch_level = at_level if reached is None else min(reached, at_level)
        self.fired = False

    def fresh(self) -> Pruning:
        """One that has not fired."""
        new = copy(self)
        new.fired = False
        return new

    def before_renoise(self, state: State, info: Info) -> State:
        """Prune, branch and log."""
        if self.fired or state.step != self.at_level:
            return state
        self.fired = True
        images = self.prior.decode(state.z0_y)
        losses = self.operator.loss(images, state.y)
        losses = torch.where(state.diverged, torch.inf, losses).tolist()
        distances = image_distances(images).tolist()
        kept = self._choose(losses, distances, state.y[:1])
        freed = sorted(set(range(len(state))) - set(kept))
        children = self._children(state, kept, len(freed)) if self.settings.branch > 0 else None
        info.add(
            "pruning",
            step=state.step,
            sigma=state.gate_sigma,
            t=state.t,
            particle_ids=state.ids,
            losses=losses,
            distances=distances,
            kept=[state.ids[i] for i in sorted(kept)],
            pruned=[state.ids[i] for i in freed],
            diverged=[i for i, lost in zip(state.ids, state.diverged.tolist(), strict=True) if lost],
            branched=[] if children is None else children.births,
        )
        return self._remove(state, sorted(kept), children)

    def _choose(self, losses: list[float], distances: list[list[float]], y: torch.Tensor) -> list[int]:
        settings = self.settings
        if settings.keep >= len(losses) and settings.rule == "loss":
            return list(range(len(losses)))
        if settings.rule == "loss":
            lowest = keep_lowest(losses, settings.keep)
            return [i for i in lowest if losses[i] < float("inf")] or lowest[:1]
        best = min((loss for loss in losses if loss < float("inf")), default=float("inf"))
        expected = self.expected(self.prior, self.operator, y)
        limit = max(best, expected.mean) + settings.tolerance * expected.std
        return keep_diverse(losses, distances, settings.keep, limit, settings.close)

    def _children(self, state: State, kept: list[int], count: int) -> State | None:
        """``count`` children of the kept particles in turn, the best first, at the branching level."""
        parents = [i for i in kept if not bool(state.diverged[i])]
        if count == 0 or not parents:
            return None
        level = state.level.new_full((count,), self.branch_level)
        return state.children([parents[i % len(parents)] for i in range(count)], level=level)

    def _remove(self, state: State, kept: list[int], children: State | None) -> State:
        if len(kept) == len(state):
            return state
        if self.settings.mode == "mask":
            masked = torch.ones_like(state.masked)
            masked[kept] = False
            return replace(state, masked=state.masked | masked)
        survivors = state[kept]
        return survivors if children is None else survivors.join(children)
