"""Hook: after the last level, anneal children of the best particles again, round by round.

The basin of an answer is decided while sigma falls from about 2.5 to 1, so a particle that failed there is not mended
by going on, and one that did well is improved by going through that band again: a child keeps of its parent what
survives the noise of ``sigma``, and finds the rest anew (the children of tree-guided diffusion planning, Jeon et al.
2025). Parents stay and compete with their children by the data loss, so a round never loses an answer.
"""

from dataclasses import dataclass, replace

import torch

from operators.operator import Operator
from priors.prior import Prior
from pruning import keep_lowest
from sampler import Hook, Info, State


@dataclass(frozen=True)
class RestartSettings:
    """How the rounds go.

    Attributes:
        rounds: number of rounds.
        keep: particles of the lowest loss that become parents; the others are dropped.
        children: particles that are annealed each round, the parents in turn, the best first.
        sigma: children are re-noised to the first sigma of the path that is at most this.
        first_child_id: least particle id of a child.
    """

    rounds: int
    keep: int = 1
    children: int = 4
    sigma: float = 2.0
    first_child_id: int = 4


class Restarts(Hook):
    """Fires ``settings.rounds`` times, each time all particles stand after the last level.

    Args:
        prior: decodes the particles.
        operator: measures them.
        settings: how the rounds go.
        path: annealing sigmas ``(K + 1,)``.
    """

    def __init__(self, prior: Prior, operator: Operator, settings: RestartSettings, path: torch.Tensor) -> None:
        self.prior, self.operator, self.settings = prior, operator, settings
        reached = [k for k, sigma in enumerate(path[:-1].tolist()) if sigma <= settings.sigma]
        self.level = reached[0] if reached else len(path) - 2
        self.rounds_done, self.next_id = 0, settings.first_child_id

    def before_renoise(self, state: State, info: Info) -> State:
        """Take note of the ids in use, so that a child's is new."""
        self.next_id = max(self.next_id, *(i + 1 for i in state.ids))
        return state

    def after_levels(self, state: State, info: Info) -> State:
        """Keep the best, add their children."""
        if self.rounds_done == self.settings.rounds or not bool(state.active.any()):
            return state
        self.rounds_done += 1
        losses = self.operator.loss(self.prior.decode(state.z0_y), state.y)
        losses = torch.where(state.active, losses, torch.inf)
        kept = [i for i in keep_lowest(losses.tolist(), self.settings.keep) if bool(state.active[i])]
        children = self._children(state, kept)
        info.add(
            "restarts",
            round=self.rounds_done,
            sigma=self.settings.sigma,
            particle_ids=state.ids,
            losses=losses.tolist(),
            kept=[state.ids[i] for i in kept],
            diverged=[i for i, lost in zip(state.ids, state.diverged.tolist(), strict=True) if lost],
            branched=[
                {"parent": p, "child": c} for p, c in zip(children.parent_id.tolist(), children.ids, strict=True)
            ],
        )
        return state[sorted(kept)].join(children)

    def _children(self, state: State, parents: list[int]) -> State:
        count = self.settings.children
        children = state[[parents[i % len(parents)] for i in range(count)]]
        ids = torch.arange(count, device=state.z.device) + self.next_id
        self.next_id += count
        level = torch.full_like(children.level, self.level)
        return replace(children, particle_id=ids, parent_id=children.particle_id, level=level)
