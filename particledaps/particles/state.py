"""The particles of one measurement, what hooks see of them and what they log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch

NUM_TIMESTEPS = 1000


class Streams(Protocol):
    """Keyed random streams, see :class:`particledaps.streams.ParticleStreams`."""

    def generators(
        self, particle_ids: list[int], purpose: str, level: int, device: torch.device | str
    ) -> list[torch.Generator]: ...

    def normal(self, particle_ids: list[int], purpose: str, level: int, like: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class State:
    """Everything that belongs to the particles of one measurement; tensors lead with the particle axis P.

    Attributes:
        z: ``(P, c, h, w)`` latents at noise level ``sigma``.
        z0_hat: ``(P, c, h, w)`` clean estimates of the ODE.
        z0_y: ``(P, c, h, w)`` estimates after MCMC.
        y: ``(P, ...)`` the measurement, repeated.
        loss: ``(P,)`` data loss at the last MCMC evaluation of this level.
        particle_id: ``(P,)`` ids that name the random streams.
        parent_id: ``(P,)`` id of the particle that a child was branched from, -1 for none.
        diverged: ``(P,)`` particles that became non-finite; frozen at their last finite values.
        masked: ``(P,)`` particles that were pruned but stay in the batch; hooks leave them out.
        level: ``(P,)`` the level each particle runs next; children of a branching stand above their parents.
        next_id: id of the next child of this run.
        streams: random streams of this image.
        step: level k, 0 to K - 1.
        sigma: noise level ``sigma_k`` of the level; ``(1, S)`` where the parts of the latents have levels of their own.
        t: time ``1000 (1 - k / K)``.
        drift: a term and its scale to add to the score in this level's ODE, or None.
        mcmc_steps: MCMC steps of this level, where they are not the run's; set by a hook before the ODE.
        gate_part: the part whose noise level hooks go by.
    """

    z: torch.Tensor
    z0_hat: torch.Tensor
    z0_y: torch.Tensor
    y: torch.Tensor
    loss: torch.Tensor
    particle_id: torch.Tensor
    parent_id: torch.Tensor
    diverged: torch.Tensor
    masked: torch.Tensor
    level: torch.Tensor
    next_id: int
    streams: Streams
    step: int = 0
    sigma: float | torch.Tensor = float("inf")
    t: float = float(NUM_TIMESTEPS)
    drift: tuple[torch.Tensor, torch.Tensor | float] | None = None
    mcmc_steps: int | None = None
    gate_part: int = 0

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, index: torch.Tensor | Sequence[int] | slice) -> State:
        """Keep some particles: every tensor is sliced at once."""
        if not isinstance(index, slice | torch.Tensor):
            index = torch.as_tensor(index, device=self.z.device)
        cut: dict[str, Any] = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name in PARTICLE_FIELDS}
        if self.drift is not None:
            term, scale = self.drift
            cut["drift"] = term[index], scale[index] if isinstance(scale, torch.Tensor) and scale.ndim else scale
        return replace(self, **cut)

    def children(self, parents: Sequence[int], least_id: int = 0, **changes: Any) -> State:
        """Copies of the particles in the rows ``parents``, under new ids, with ``changes`` to their tensors.

        ``join`` them to this state: they know the ``next_id`` after them.
        """
        rows = torch.tensor(list(parents), dtype=torch.long, device=self.z.device)
        copies, first = self[rows], max(self.next_id, least_id)
        ids = first + torch.arange(len(rows), device=rows.device)
        family: dict[str, Any] = {"particle_id": ids, "parent_id": copies.particle_id, "next_id": first + len(copies)}
        return replace(copies, **family, **changes)

    def join(self, other: State) -> State:
        """These particles, then those of ``other``; what belongs to the level is taken from ``other``."""
        parts: dict[str, Any] = {
            name: torch.cat([getattr(self, name), getattr(other, name)]) for name in PARTICLE_FIELDS
        }
        return replace(other, **parts, drift=None)

    @property
    def gate_sigma(self) -> float:
        """Noise level that hooks go by and that is shown: that of the part ``gate_part``."""
        return self.sigma[0, self.gate_part].item() if isinstance(self.sigma, torch.Tensor) else self.sigma

    @property
    def active(self) -> torch.Tensor:
        """``(P,)`` particles that are neither diverged nor masked."""
        return ~(self.diverged | self.masked)

    @property
    def ids(self) -> list[int]:
        """Particle ids as numbers."""
        return self.particle_id.tolist()

    @property
    def births(self) -> list[dict[str, int]]:
        """Parent and id of each particle, for the log of who made children."""
        return [{"parent": p, "child": c} for p, c in zip(self.parent_id.tolist(), self.ids, strict=True)]

    def lowest(self, values: torch.Tensor, count: int) -> list[int]:
        """Rows of the ``count`` active particles of the lowest finite ``values`` ``(P,)``, best first; maybe fewer."""
        able = self.active & values.isfinite()
        return torch.where(able, values, torch.inf).argsort(stable=True)[: min(count, int(able.sum()))].tolist()


@dataclass(frozen=True)
class Start:
    """Where particles begin that do not begin as pure noise.

    Attributes:
        z0: ``(P, c, h, w)`` clean latents; each particle starts at its own, re-noised.
        level: the first level that runs, ``z = z0 + path[level] * noise``.
    """

    z0: torch.Tensor
    level: int


PARTICLE_FIELDS = ("z", "z0_hat", "z0_y", "y", "loss", "particle_id", "parent_id", "diverged", "masked", "level")


@dataclass
class Info:
    """What a run wants to log: rows by kind, e.g. ``info.add("repulsion", step=3, ...)``."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    parts: dict[str, Info] = field(default_factory=dict)

    def add(self, kind: str, **row: Any) -> None:
        """Append one row."""
        self.rows.setdefault(kind, []).append(row)

    def part(self, name: str) -> Info:
        """A log of its own within this one."""
        return self.parts.setdefault(name, Info())


class Hook:
    """Base of all hooks; each moment takes and returns the state, by default unchanged.

    Within a level the state holds the particles that stand at that level (after a branching the others wait). What a
    hook remembers from level to level belongs to one image: the loop asks it for a :meth:`fresh` one for each.
    """

    def fresh(self) -> Hook:
        """This hook as it stands before the first level; itself, if it remembers nothing."""
        return self

    def before_ode(self, state: State, info: Info) -> State:
        """``state.z`` stands at ``state.sigma``; may set ``state.drift``."""
        return state

    def after_mcmc(self, state: State, info: Info) -> State:
        """``z0_hat``, ``z0_y`` and ``loss`` of this level are known."""
        return state

    def before_renoise(self, state: State, info: Info) -> State:
        """Last look at the level; may remove particles, or add some with an earlier ``level``."""
        return state

    def after_levels(self, state: State, info: Info) -> State:
        """Every particle stands after the last level; may add some with an earlier ``level``, which run again."""
        return state

    def at_end(self, state: State, info: Info) -> State:
        """After the last level: the answer is ``state.z0_y``."""
        return state
