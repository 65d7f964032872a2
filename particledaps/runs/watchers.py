"""What a person sees while a run goes on, and the hooks that keep time and pictures."""

from __future__ import annotations

import torch

from particledaps.particles.state import Hook, Info, State
from particledaps.priors.prior import Prior
from particledaps.reports.pictures import Snapshot
from particledaps.runs.progress import ImageProgress


class ProgressHook(Hook):
    """Counts the levels of an image, with sigma and the lowest data loss beside its expectation.

    Args:
        progress: of the image.
        expected: the loss expected at the truth.
    """

    def __init__(self, progress: ImageProgress, expected: float) -> None:
        self.progress, self.expected = progress, expected

    def before_renoise(self, state: State, info: Info) -> State:
        loss = min(state.loss[state.active].tolist(), default=float("nan"))
        self.progress.level(f"sigma {state.gate_sigma:.3g}, misfit {loss:.4g} (floor {self.expected:.4g})")
        return state


class TrajectoryHook(Hook):
    """Keeps ``z0_hat`` and ``z0_y`` of evenly spaced levels on the CPU; those wanted are decoded once, at the end.

    Args:
        num_levels: levels of the run.
        num_kept: levels to keep.
    """

    def __init__(self, num_levels: int, num_kept: int = 9) -> None:
        count = min(num_kept, num_levels)
        self.num_levels = num_levels
        self.kept = {round(i * (num_levels - 1) / max(count - 1, 1)) for i in range(count)}
        self.rows: list[Snapshot] = []
        self.parents: dict[int, int] = {}
        self.finished: dict[int, torch.Tensor] = {}

    def before_renoise(self, state: State, info: Info) -> State:
        self.parents.update(zip(state.ids, state.parent_id.tolist(), strict=True))
        here = state[state.level == state.step + 1]  # not the children that were just born
        if state.step in self.kept:
            self.rows.append(Snapshot(state.step, state.gate_sigma, here.ids, here.z0_hat.cpu(), here.z0_y.cpu()))
        return state

    def after_levels(self, state: State, info: Info) -> State:
        """Keep parents as their children find them, after any polish."""
        return self._finish(state)

    def at_end(self, state: State, info: Info) -> State:
        """Keep the answers."""
        return self._finish(state)

    def _finish(self, state: State) -> State:
        self.parents.update(zip(state.ids, state.parent_id.tolist(), strict=True))
        done = (state.level == self.num_levels).tolist()
        self.finished.update({i: z.cpu() for i, z, own in zip(state.ids, state.z0_y, done, strict=True) if own})
        return state

    def _line(self, particle_id: int) -> list[int]:
        """Ids of the ancestors, the first generation first, then its own."""
        ids = [particle_id]
        while self.parents.get(ids[0], -1) >= 0:
            ids.insert(0, self.parents[ids[0]])
        return ids

    def lineage(self, prior: Prior, device: torch.device, particle_id: int) -> list[tuple[int, torch.Tensor]]:
        """Ids and images ``(C, H, W)`` of a particle's ancestors, the first generation first, then of itself."""
        known = [i for i in self._line(particle_id) if i in self.finished]
        return [(i, prior.decode(self.finished[i][None].to(device))[0].cpu()) for i in known]

    def decoded(self, prior: Prior, device: torch.device, particle_ids: list[int]) -> list[Snapshot]:
        """The same levels as images, of the first generation and of these particles with all their ancestors."""
        wanted = {i for i, parent in self.parents.items() if parent < 0}
        wanted.update(i for own in particle_ids for i in self._line(own))

        def images(z: torch.Tensor) -> torch.Tensor:
            return prior.decode(z.to(device)).cpu()

        shown = []
        for row in self.rows:
            kept = [k for k, own in enumerate(row.ids) if own in wanted]
            if kept:
                ids = [row.ids[k] for k in kept]
                shown.append(row._replace(ids=ids, before=images(row.before[kept]), after=images(row.after[kept])))
        return shown
