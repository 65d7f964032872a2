"""Hook: after the last level, anneal children of the best particles again, round by round.

The basin of an answer is decided while sigma falls from about 2.5 to 1, so a particle that failed there is not mended
by going on, and one that did well is improved by going through that band again: a child keeps of its parent what
survives the noise of its round's sigma, and finds the rest anew (the children of tree-guided diffusion planning, Jeon
et al. 2025). Parents stay and compete with their children, so a round never loses an answer.

With ``polish`` every particle is first brought to the bottom of its basin: what the chain's noise leaves in an estimate
hides the differences between basins, and is re-noised for nothing. This is basin hopping (Wales and Doye 1997) with the
diffusion prior as the move.

What re-noising cannot change are the lowest frequencies, which stand far above the noise of any round: a parent whose
shading belongs to the other twin hands it on to every child. With ``conjugated`` some children of a parent that no
child of an earlier round has displaced begin with a random band of its lowest frequencies turned to the other twin.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from diffusion.paths import first_level_at_most
from operators.operator import Operator
from operators.symmetry_moves import conjugate_drawn_bands, draw_low_band
from priors.prior import Prior
from state import Hook, Info, State

RULES = ("loss", "posterior")


@dataclass(frozen=True)
class RestartSettings:
    """How the rounds go.

    Attributes:
        rounds: number of rounds.
        keep: particles that become parents, the best ones; the others are dropped.
        children: particles that are annealed each round, the parents in turn, the best first.
        sigmas: of the rounds in turn, from the first again after the last; children are re-noised to the first sigma of
            the path that is at most this, or else to its last.
        mcmc_steps: MCMC steps of the children, a level; None: as all others.
        first_child_id: least particle id of a child.
        conjugated: of a round's children so many, the last ones, begin at their parent with a band of its lowest
            frequencies conjugated (:func:`operators.symmetry_moves.draw_low_band`), if it was a parent before.
    """

    rounds: int
    keep: int = 1
    children: int = 4
    sigmas: tuple[float, ...] = (2.0,)
    mcmc_steps: int | None = None
    first_child_id: int = 0
    conjugated: int = 0


def restart_levels(path: torch.Tensor, sigmas: Sequence[float]) -> list[int]:
    """The levels to whose sigmas children are re-noised, see ``RestartSettings.sigmas``."""
    reached = [first_level_at_most(path, sigma) for sigma in sigmas]
    return [len(path) - 2 if level is None else level for level in reached]


class Restarts(Hook):
    """Fires ``settings.rounds`` times, each time all particles stand after the last level.

    Args:
        prior: decodes the particles.
        operator: measures them.
        settings: how the rounds go.
        path: annealing sigmas ``(K + 1,)``.
        polish: ``(z, y) -> z`` of particles ``(P, ...)`` and their measurements, applied to each particle once, when it
            has come to the end; None leaves them as the chain left them.
        energy: ``(z, loss) -> (P,)``, what particles of data losses ``(P,)`` compete by, lower is better; None: by the
            data loss.
    """

    def __init__(
        self,
        prior: Prior,
        operator: Operator,
        settings: RestartSettings,
        path: torch.Tensor,
        polish: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        energy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.prior, self.operator, self.settings, self.polish, self.energy = prior, operator, settings, polish, energy
        self.levels, self.path = restart_levels(path, settings.sigmas), path.tolist()
        self.rounds_done, self.polished, self.parents = 0, set(), set()

    def before_ode(self, state: State, info: Info) -> State:
        """Children have chains of their own length."""
        return state if self.rounds_done == 0 else replace(state, mcmc_steps=self.settings.mcmc_steps)

    def after_levels(self, state: State, info: Info) -> State:
        """Polish who is new, keep the best, add their children."""
        state = self._polish(state)
        if self.rounds_done == self.settings.rounds:
            return state
        losses = self.operator.loss(self.prior.decode(state.z0_y), state.y)
        energies = losses if self.energy is None else self.energy(state.z0_y, losses)
        kept = state.lowest(energies, self.settings.keep)
        if not kept:
            return state
        turn = self.rounds_done % len(self.levels)
        self.rounds_done += 1
        parents = [kept[i % len(kept)] for i in range(self.settings.children)]
        level = state.level.new_full((len(parents),), self.levels[turn])
        children = state.children(parents, self.settings.first_child_id, level=level)
        last = range(len(parents) - self.settings.conjugated, len(parents))
        turned = [i for i in last if state.ids[parents[i]] in self.parents]
        children = self._conjugate(children, turned)
        self.parents.update(state.ids[i] for i in parents)
        info.add(
            "restarts",
            round=self.rounds_done,
            step=self.levels[turn],
            sigma=self.path[self.levels[turn]],
            particle_ids=state.ids,
            losses=losses.tolist(),
            energies=energies.tolist(),
            kept=[state.ids[i] for i in kept],
            diverged=[i for i, lost in zip(state.ids, state.diverged.tolist(), strict=True) if lost],
            branched=children.births,
            conjugated=[children.ids[i] for i in turned],
        )
        return state[sorted(kept)].join(children)

    def _conjugate(self, children: State, turned: list[int]) -> State:
        """The children, those in the rows ``turned`` with a band of the other twin."""
        if not turned:
            return children
        ids = [children.ids[i] for i in turned]
        generators = children.streams.generators(ids, "restart_band", 0, torch.device("cpu"))
        images = conjugate_drawn_bands(self.prior.decode(children.z0_y[turned]), draw_low_band, generators)
        z0_y = children.z0_y.clone()
        z0_y[turned] = self.prior.encode(images.clamp(-1, 1)).to(z0_y)
        return replace(children, z0_y=z0_y)

    def _polish(self, state: State) -> State:
        rows = [i for i, own in enumerate(state.ids) if bool(state.active[i]) and own not in self.polished]
        if self.polish is None or not rows:
            return state
        self.polished.update(state.ids[i] for i in rows)
        z0_y = state.z0_y.clone()
        z0_y[rows] = self.polish(state.z0_y[rows], state.y[rows])
        return replace(state, z0_y=z0_y)
