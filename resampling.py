r"""Hook: late in the annealing, particles of high loss give way to copies of those of low loss.

The weights :math:`w_i \propto e^{-\beta (L_i - \min L) / 2 \tau^2}` are tempered: with ``beta = 1`` a single particle
would take all, so ``beta`` is chosen such that the effective sample size :math:`1 / \sum w_i^2` is half of the
particles. Copies part from their parents at the next re-noising, which their own random streams drive.
"""

import itertools
import math
from dataclasses import dataclass

import torch

from state import Hook, Info, State


@dataclass(frozen=True)
class ResamplingSettings:
    """When and how.

    Attributes:
        sigma_max: resample at levels with at most this sigma.
        sigma_min: and at least this one.
        noise_sigma: standard deviation of the measurement noise.
        last_level: the run's last level; nothing would part copies there, so it does not resample.
        from_level: the first level that may resample (pruning comes first).
        stream_id: names the image's own random stream.
    """

    sigma_max: float
    sigma_min: float
    noise_sigma: float
    last_level: int
    from_level: int
    stream_id: int


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
    count, total, edges = len(weights), sum(weights), [0]
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
    """Systematic resampling between ``sigma_max`` and ``sigma_min``.

    Args:
        settings: when and how.
    """

    def __init__(self, settings: ResamplingSettings) -> None:
        self.settings = settings
        self.roots: dict[int, int] = {}

    def before_renoise(self, state: State, info: Info) -> State:
        """Resample the particles that are neither diverged nor masked."""
        settings = self.settings
        self._note_lineages(state)
        late = settings.sigma_min <= state.sigma <= settings.sigma_max and state.step != settings.last_level
        if not late or state.step < settings.from_level:
            return state
        rows = (state.active & state.loss.isfinite()).nonzero().flatten().tolist()
        return self._resample(state, rows, info) if len(rows) > 2 else state

    def _resample(self, state: State, rows: list[int], info: Info) -> State:
        ids = [state.ids[i] for i in rows]
        losses = state.loss[rows].tolist()
        energies = [loss / (2 * self.settings.noise_sigma**2) for loss in losses]
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
            sigma=state.sigma,
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
        stream = [self.settings.stream_id], "resample", state.step, torch.device("cpu")
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
