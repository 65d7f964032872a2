"""What a person sees while a run goes on, and the hooks that keep time and pictures."""

import math
from typing import Any

import torch
from tqdm import tqdm

from priors.prior import Prior
from runs.plots import Snapshot
from state import Hook, Info, State

UNEXPLAINED = 3.0
"""A loss of more than so many floors is no fit of a measurement."""


class ProgressHook(Hook):
    """A bar over the levels with sigma and the lowest data loss beside its expectation.

    Args:
        bar: counts levels.
        expected: the loss expected at the truth.
    """

    def __init__(self, bar: tqdm, expected: float) -> None:
        self.bar, self.expected = bar, expected

    def before_renoise(self, state: State, info: Info) -> State:
        loss = min(state.loss[state.active].tolist(), default=float("nan"))
        self.bar.set_postfix_str(f"sigma {state.sigma:.3g}, misfit {loss:.4g} (floor {self.expected:.4g})")
        if self.bar.n == self.bar.total:  # children go through some levels again
            self.bar.total += 1
        self.bar.update()
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
            self.rows.append(Snapshot(state.step, state.sigma, here.ids, here.z0_hat.cpu(), here.z0_y.cpu()))
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


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table, a dash for None."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def magnitude(value: float | None) -> str:
    """A number that may be huge, in at most eight characters; a dash for None."""
    return f"{value:.3e}" if value is not None and abs(value) >= 1e6 else number(value, 1)


def results_table(metrics: dict[str, Any], names: dict[int, str]) -> str:
    """The table at the end of a run: one row an image, then the means.

    ``oracle`` is the best particle by the truth; ``selected`` is chosen without it.
    """
    header = f"{'image':<22}{'oracle':>8}{'mean':>8}{'selected':>10}{'aligned':>9}{'mean':>8}"
    header += f"{'loss':>10}{'floor':>9}  {'modes':<24}{'s':>6}"
    lines = ["PSNR in dB: raw oracle, mean and selected without truth; aligned oracle and mean", header]
    rows = zip(metrics["measurement"]["per_image"], metrics["timing"]["per_image_seconds"], strict=True)
    for position, (measured, seconds) in enumerate(rows):
        quality = [""] * 5
        labels = "-"
        if metrics["psnr"] is not None:
            raw = metrics["psnr"]["per_image"][position]
            aligned = metrics["psnr_aligned"]["per_image"][position]
            quality = [raw["best"], raw["mean"], raw["selected"], aligned["best"], aligned["mean"]]
            labels = ",".join(metrics["modes"]["per_image"][position]["labels"])
        a, b, c, d, e = (number(q) if q != "" else "-" for q in quality)
        loss = magnitude(min(measured["loss"], default=None))
        name = names.get(measured["image_id"], str(measured["image_id"]))[:21]
        floor = magnitude(measured["noise_floor"])
        lines.append(f"{name:<22}{a:>8}{b:>8}{c:>10}{d:>9}{e:>8}{loss:>10}{floor:>9}  {labels:<24}{seconds:>6.0f}")
    if metrics["psnr"] is not None:
        raw, aligned = metrics["psnr"]["overall"], metrics["psnr_aligned"]["overall"]
        a, b, c = (number(raw[k]) for k in ("best_mean", "mean_of_means", "selected_mean"))
        d, e = (number(aligned[k]) for k in ("best_mean", "mean_of_means"))
        lines.append(f"{'mean':<22}{a:>8}{b:>8}{c:>10}{d:>9}{e:>8}")
    return "\n".join(lines + unexplained_lines(metrics, names) + agreement_lines(metrics, names))


def unexplained_lines(metrics: dict[str, Any], names: dict[int, str]) -> list[str]:
    """Images whose measurement no particle explains, though a loss near the floor was to be expected."""
    found = []
    for row in metrics["measurement"]["per_image"]:
        loss, floor = min(row["loss"], default=None), row["noise_floor"]
        if loss is not None and floor is not None and loss > UNEXPLAINED * floor:
            name = names.get(row["image_id"], str(row["image_id"]))
            found.append(f"{name} (loss {magnitude(loss).strip()}, {loss / floor:.0f} floors)")
    if not found:
        return []
    return [
        f"not explained: {', '.join(found)}: is the measurement in the convention that the task expects, "
        "and has the sampler enough steps?"
    ]


def agreement_lines(metrics: dict[str, Any], names: dict[int, str]) -> list[str]:
    """In how many images two lineages of restarts agreed, and in which not; nothing where nobody asked."""
    ends = {row["image_id"]: row["end"] for row in (metrics["restarts"] or {"per_image": []})["per_image"]}
    asked = {image_id: end["agreed"] for image_id, end in ends.items() if end and end["agreed"] is not None}
    if not asked:
        return []
    doubtful = [names.get(image_id, str(image_id)) for image_id, agreed in asked.items() if not agreed]
    lines = [f"two lineages agreed in {len(asked) - len(doubtful)} of {len(asked)} images"]
    return lines + ([f"no two agreed in: {', '.join(doubtful)}"] if doubtful else [])
