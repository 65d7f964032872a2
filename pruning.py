"""Hook: once, at a chosen level, drop particles and perhaps branch children from the survivors.

Pruning looks at the data loss of the decoded ``z0_y`` and at the distance of the images themselves, without
alignment, so that both twins of a phase retrieval count as different and may both survive. Children follow
tree-guided diffusion planning (Jeon et al. 2025): a survivor is re-noised to a middle sigma and annealed again.
"""

from dataclasses import dataclass, replace

import torch

from diffusion.paths import first_level_at_most
from operators.operator import Operator
from priors.prior import Prior
from state import Hook, Info, State

RULES = ("loss", "diverse")
MODES = ("slice", "mask")


@dataclass(frozen=True)
class PruningSettings:
    """What to keep.

    Attributes:
        at_level: level at whose end pruning happens.
        keep: number of particles to keep at most.
        rule: ``loss`` keeps the lowest losses; ``diverse`` drops the worse of a close pair, and keeps a far one only
            while its loss is within ``tolerance`` of the loss expected at the answer (or of the best, if that is more).
        mode: ``slice`` removes particles and frees their memory; ``mask`` lets them run on unseen.
        tolerance: of ``diverse``, in standard deviations of the loss at the answer.
        close: of ``diverse``: root-mean-square distance of two images in [0, 1] below which they are one.
        branch_sigma: fill the freed places with children of the survivors, re-noised to the first sigma of the path
            that is at most this; 0 is off.
    """

    at_level: int
    keep: int = 2
    rule: str = "loss"
    mode: str = "slice"
    tolerance: float = 3.0
    close: float = 0.1
    branch_sigma: float = 0.0


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
    """Fires once, at the end of ``settings.at_level``.

    Args:
        prior: decodes the particles.
        operator: measures them.
        settings: what to keep.
        path: annealing sigmas ``(K + 1,)``.
        expected: loss expected at the answer: noise floor and the prior's misfit.
        loss_std: its standard deviation, unit of the tolerance.
    """

    def __init__(
        self,
        prior: Prior,
        operator: Operator,
        settings: PruningSettings,
        path: torch.Tensor,
        expected: float,
        loss_std: float,
    ) -> None:
        self.prior, self.operator, self.settings = prior, operator, settings
        self.expected, self.loss_std = expected, loss_std
        reached = first_level_at_most(path, settings.branch_sigma)
        self.branch_level = settings.at_level if reached is None else min(reached, settings.at_level)
        self.fired = False

    def before_renoise(self, state: State, info: Info) -> State:
        """Prune, branch and log."""
        if self.fired or state.step != self.settings.at_level:
            return state
        self.fired = True
        images = self.prior.decode(state.z0_y)
        losses = self.operator.loss(images, state.y)
        losses = torch.where(state.diverged, torch.inf, losses).tolist()
        distances = image_distances(images).tolist()
        kept = self._choose(losses, distances)
        freed = sorted(set(range(len(state))) - set(kept))
        children = self._children(state, kept, len(freed)) if self.settings.branch_sigma > 0 else None
        info.add(
            "pruning",
            step=state.step,
            sigma=state.sigma,
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

    def _choose(self, losses: list[float], distances: list[list[float]]) -> list[int]:
        settings = self.settings
        if settings.keep >= len(losses) and settings.rule == "loss":
            return list(range(len(losses)))
        if settings.rule == "loss":
            lowest = keep_lowest(losses, settings.keep)
            return [i for i in lowest if losses[i] < float("inf")] or lowest[:1]
        best = min((loss for loss in losses if loss < float("inf")), default=float("inf"))
        limit = max(best, self.expected) + settings.tolerance * self.loss_std
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
