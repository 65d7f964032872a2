"""Hook: after the last level, anneal children of the best particles again, round by round.

The basin of an answer is decided while sigma falls from about 2.5 to 1, so a particle that failed there is not mended
by going on, and one that did well is improved by going through that band again: a child keeps of its parent what
survives the noise of its round's sigma, and finds the rest anew (the children of tree-guided diffusion planning, Jeon
et al. 2025). Parents stay and compete with their children, so a round never loses an answer.

With ``polish`` every particle is first brought to the bottom of its basin: what the chain's noise leaves in an estimate
hides the differences between basins, and is re-noised for nothing. This is basin hopping (Wales and Doye 1997) with the
diffusion prior as the move.

What re-noising cannot change are the lowest frequencies, which stand far above the noise of any round: a parent whose
shading belongs to the other twin hands it on to every child. With ``conjugate`` some children of a parent that no
child of an earlier round has displaced begin with a random band of its lowest frequencies turned to the other twin.

One line of descent can stay in a wrong basin for good. With ``lineages`` several lines of descent compete only within
themselves, and two that arrive at one image vouch for it: wrong basins are many, the right one is one. With
``agreement`` the rounds end there, and only images on which no two lineages agree get all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from particledaps.operators.symmetry_moves import conjugate_drawn_bands, draw_low_band
from particledaps.particles.descent import polish
from particledaps.particles.hook_setup import Setup, need_flip
from particledaps.particles.state import Hook, Info, State
from particledaps.paths.schedules import first_level_at_most
from particledaps.settings.hook_keys import HooksAsked, key

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior

PREFIX = "restart"
RULES = ("loss", "posterior")


MAX_PSNR_DB = 80.0
"""Of equal images, see :func:`particledaps.evaluation.metrics.psnr_db`."""


@dataclass(frozen=True)
class Settings:
    """How the rounds go; the keys ``restart_*``.

    Attributes:
        rounds: number of rounds after the last level, 0 is off.
        keep: particles that become parents, the best ones; the others are dropped.
        rule: what particles compete by for the next round. ``loss``: the data loss; ``posterior``: with the prior's
            energy, ``loss / (2 tau^2) - log p`` in nats, tau from ``optimization_tau``. Who is left after the last
            round of one lineage stays; ``optimization_best`` chooses among them by the data loss. Several lineages
            compete by this rule after the last round too.
        children: particles that are annealed each round, the parents in turn, the best first.
        lineages: the first particles are divided evenly into so many, in their order; ``keep`` and ``children`` are
            those of each. After the last round all compete, and ``keep`` particles are left (with one lineage parents
            and children of the last round stay).
        agreement: no further round once the best particles of two lineages, one of them the best of all, agree to this
            PSNR in dB, whichever twins they show; None: all rounds.
        refinements: rounds of the best lineage alone after two agreed, with plain children.
        sigmas: of the rounds in turn, from the first again after the last; children are re-noised to the first sigma of
            the path that is at most this, or else to its last.
        conjugate: of a round's children so many, the last ones of each lineage, begin at their parent with a band of
            its lowest frequencies turned to the other twin
            (:func:`particledaps.operators.symmetry_moves.draw_low_band`), if it was a parent before; needs the
            180-degree flip as a symmetry.
        steps: MCMC steps of the children, a level; None: as all others.
        polish: posterior optimisation of each particle before a round compares them, in iterations; takes
            ``optimization_lr``, ``optimization_prior_sigma`` and ``optimization_tau``; 0 is off.
    """

    rounds: int = key(0, low=0, high=1000)
    keep: int = key(1, low=1)
    rule: str = key("loss", words=RULES)
    children: int = key(4, low=1, high=4096)
    lineages: int = key(1, low=1)
    agreement: float | None = key(None, low=0, high=MAX_PSNR_DB, open_low=True)
    refinements: int = key(0, low=0)
    sigmas: tuple[float, ...] = key((2.0,), low=0, open_low=True)
    conjugate: int = key(0, low=0)
    steps: int | None = key(None, low=1)
    polish: int = key(0, low=0)


def conflicts(settings: Settings, asked: HooksAsked) -> Iterator[str]:
    """Sentences on values that exclude each other."""
    if not settings.sigmas:
        yield "restart_sigmas=[]: must name at least one sigma"
    if settings.conjugate > settings.children:
        yield f"restart_conjugate={settings.conjugate}: there are only restart_children={settings.children} a round"
    if settings.conjugate > 0 and settings.rounds == 1:
        yield (
            f"restart_conjugate={settings.conjugate}: parents are turned from their second round on; use "
            "restart_rounds=2 or more"
        )
    if settings.lineages > asked.num_samples:
        yield (f"restart_lineages={settings.lineages}: there are only num_samples={asked.num_samples} particles")
    if settings.rounds > 0 and settings.lineages > 1:
        yield from _not_apart(settings, asked)
    if settings.agreement is not None and settings.lineages <= 1:
        yield (
            f"restart_agreement={settings.agreement:g}: one lineage has none to agree with; use "
            "restart_lineages=2 or more"
        )
    if settings.refinements > 0 and settings.agreement is None:
        yield (f"restart_refinements={settings.refinements}: they follow an agreement; set restart_agreement, in dB")
    if settings.polish > 0 and asked["optimization"].prior_sigma <= 0:
        yield (
            f"restart_polish={settings.polish}: polishing is posterior optimisation; it needs "
            "optimization_prior_sigma > 0"
        )


def _not_apart(settings: Settings, asked: HooksAsked) -> Iterator[str]:
    """Lineages that exchange particles would agree with themselves."""
    resample, pruning = asked["resample"], asked["pruning"]
    exchanges = {
        f"resample_sigma={resample.sigma:g}": resample.sigma > 0,
        f"pruning_branch={pruning.branch:g}": pruning.step >= 0 and pruning.branch > 0,
        "symmetry_moves with crossover": "crossover" in asked["symmetry"].moves,
    }
    for exchange, on in exchanges.items():
        if on:
            yield f"{exchange}: it copies particles from lineage to lineage; use restart_lineages=1"
    if pruning.step >= 0 and pruning.keep < settings.lineages:
        yield f"pruning_keep={pruning.keep}: leaves fewer particles than restart_lineages={settings.lineages}"


def build(settings: Settings, setup: Setup) -> Restarts | None:
    """The hook; None if it is off.

    Raises:
        SettingsError: bands are to be turned, and the operator would notice.
    """
    if settings.rounds == 0:
        return None
    from particledaps.evaluation.modes import agreement_db
    from particledaps.evaluation.orientation import latent_plausibility, posterior_energy

    if settings.conjugate > 0:
        need_flip(setup.operator, f"restart_conjugate={settings.conjugate}", "restart_conjugate=0")
    prior = setup.prior
    operator = setup.operator
    optimization = setup.asked["optimization"]
    tau = operator.noise_sigma if optimization.tau is None else optimization.tau

    def energy(z: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return posterior_energy(prior, latent_plausibility(prior, z), loss, tau)

    descent = optimization.descent(tau, settings.polish)
    return Restarts(
        prior,
        operator,
        settings,
        setup.path,
        2 * setup.asked.num_samples,  # the streams of the measurements in docs/lab/one_answer.md
        partial(polish, prior=prior, operator=operator, settings=descent) if settings.polish > 0 else None,
        energy if settings.rule == "posterior" else None,
        partial(agreement_db, symmetries=operator.symmetries()) if settings.lineages > 1 else None,
    )


def record(settings: Settings, hook: Restarts | None, info: Info, particle_ids: list[int]) -> dict[str, Any]:
    """The rounds of one image, and how they ended."""
    end = next(iter(info.rows.get("restarts_end", [])), None)
    return {"restarts": info.rows.get("restarts"), "restarts_end": end}


def restart_levels(path: torch.Tensor, sigmas: Sequence[float]) -> list[int]:
    """The levels to whose sigmas children are re-noised, see ``Settings.sigmas``."""
    reached = [first_level_at_most(path, sigma) for sigma in sigmas]
    return [len(path) - 2 if level is None else level for level in reached]


class Restarts(Hook):
    """Makes children each time all particles stand after the last level, until ``settings`` say it is enough.

    Args:
        prior: decodes the particles.
        operator: measures them.
        settings: how the rounds go.
        path: annealing sigmas ``(K + 1,)``.
        first_child_id: least particle id of a child.
        polish: ``(z, y) -> z`` of particles ``(P, ...)`` and their measurements, applied to each particle once, when it
            has come to the end; None leaves them as the chain left them.
        energy: ``(z, loss) -> (P,)``, what particles of data losses ``(P,)`` compete by, lower is better; None: by the
            data loss.
        agree: ``(x, other) -> (P,)``, how well images ``(1, ...)`` and ``(P, ...)`` agree, in dB; None with one
            lineage.
    """

    def __init__(
        self,
        prior: Prior,
        operator: Operator,
        settings: Settings,
        path: torch.Tensor,
        first_child_id: int = 0,
        polish: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        energy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        agree: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self.prior = prior
        self.operator = operator
        self.settings = settings
        self.first_child_id = first_child_id
        self.polish = polish
        self.energy = energy
        self.agree = agree
        self.levels, self.path = restart_levels(path, settings.sigmas), path.tolist()
        self._begin()

    def _begin(self) -> None:
        self.rounds_done, self.last_round = 0, self.settings.rounds
        self.polished: set[int] = set()
        self.parents: set[int] = set()
        self.lineage: dict[int, int] = {}
        self.partner: torch.Tensor | None = None  # the image that the best one agreed with

    def fresh(self) -> Restarts:
        """One before its first round."""
        new = copy(self)
        new._begin()
        return new

    @property
    def agreed(self) -> bool:
        """Two lineages have agreed."""
        return self.partner is not None

    def before_ode(self, state: State, info: Info) -> State:
        """Children have chains of their own length."""
        return state if self.rounds_done == 0 else replace(state, mcmc_steps=self.settings.steps)

    def after_levels(self, state: State, info: Info) -> State:
        """Polish who is new, keep the best, add their children."""
        state, settings = self._polish(state), self.settings
        if self.rounds_done == self.last_round and settings.lineages == 1:
            return state
        images = self.prior.decode(state.z0_y)
        losses = self.operator.loss(images, state.y)
        energies = losses if self.energy is None else self.energy(state.z0_y, losses)
        families = self._best_of_lineages(state, energies)
        if not families:
            return state
        facts = {
            "particle_ids": state.ids,
            "losses": losses.tolist(),
            "energies": energies.tolist(),
            "diverged": [i for i, lost in zip(state.ids, state.diverged.tolist(), strict=True) if lost],
        }
        if settings.lineages > 1:
            facts["agreement_db"] = self._look_for_agreement(images, [rows[0] for rows in families])
        if self.rounds_done == self.last_round:
            kept = families[0] if self.agreed else state.lowest(energies, settings.keep)
            asked = settings.agreement is not None and len(set(self.lineage.values())) > 1
            ids, agreed = [state.ids[i] for i in kept], self.agreed if asked else None
            info.add("restarts_end", rounds=self.rounds_done, agreed=agreed, kept=ids, **facts)
            return state[sorted(kept)]
        return self._next_round(state, families[:1] if self.agreed else families, facts, info)

    def _next_round(self, state: State, families: list[list[int]], facts: dict[str, Any], info: Info) -> State:
        """The best particles of each lineage and, above them, their children."""
        settings, turn = self.settings, self.rounds_done % len(self.levels)
        self.rounds_done += 1
        kept = [row for rows in families for row in rows]
        parents = [rows[i % len(rows)] for rows in families for i in range(settings.children)]
        level = state.level.new_full((len(parents),), self.levels[turn])
        children = state.children(parents, self.first_child_id, level=level)
        self.lineage.update({pair["child"]: self.lineage.get(pair["parent"], 0) for pair in children.births})
        first_turned = settings.children - (0 if self.agreed else settings.conjugate)
        last = [i for i in range(len(parents)) if i % settings.children >= first_turned]
        turned = [i for i in last if state.ids[parents[i]] in self.parents]
        children = self._conjugate(children, turned)
        self.parents.update(state.ids[i] for i in parents)
        info.add(
            "restarts",
            round=self.rounds_done,
            step=self.levels[turn],
            sigma=self.path[self.levels[turn]],
            kept=[state.ids[i] for i in kept],
            branched=children.births,
            conjugated=[children.ids[i] for i in turned],
            **facts,
        )
        return state[sorted(kept)].join(children)

    def _best_of_lineages(self, state: State, energies: torch.Tensor) -> list[list[int]]:
        """Rows of the best particles of each lineage that has any, the lineage of the best particle first."""
        if self.rounds_done == 0:
            first = [own for own, able in zip(state.ids, state.active.tolist(), strict=True) if able]
            self.lineage = {own: i * self.settings.lineages // len(first) for i, own in enumerate(first)}
        # with one lineage copies that another hook made belong to it too; several refuse such hooks
        own = torch.tensor([self.lineage.get(i, 0) for i in state.ids], device=energies.device)
        numbers = range(self.settings.lineages)
        best = [state.lowest(energies.where(own == number, torch.inf), self.settings.keep) for number in numbers]
        return sorted((rows for rows in best if rows), key=lambda rows: energies[rows[0]].item())

    def _look_for_agreement(self, images: torch.Tensor, best: list[int]) -> float | None:
        """How well the best image agrees with that of the most similar other lineage; sets the end if well enough.

        Once two agreed: with the other's image of then, which is not in the state any more. None without another.
        """
        others = images[best[1:]] if self.partner is None else self.partner
        if self.agree is None or len(others) == 0:
            return None
        found = self.agree(images[best[:1]], others)
        agreement, needed = found.max().item(), self.settings.agreement
        if not self.agreed and needed is not None and agreement >= needed:
            self.partner, self.last_round = others[found.argmax()][None], self.rounds_done + self.settings.refinements
        return agreement

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
