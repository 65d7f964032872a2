"""Reconstruct one measurement: sample, score, choose, record."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from particledaps.data.measurements import FORM, ORIGIN
from particledaps.evaluation.metrics import Evaluator, Scores, psnr_db
from particledaps.evaluation.modes import Modes, channel_agreement, find_modes, has_twins, symmetry_index
from particledaps.evaluation.selection import Candidates, select
from particledaps.files import replacing
from particledaps.operators.magnitudes import Convention
from particledaps.operators.measured import with_gaps
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.particles.state import Info, State
from particledaps.reports.write_metrics import ALIGNMENTS, Record
from particledaps.runs.calls import Calls
from particledaps.runs.clock import ClockHook, PhaseClock, Seconds
from particledaps.runs.drawing import draw_result
from particledaps.runs.folder import RunFolder
from particledaps.runs.method import Method
from particledaps.runs.pending import Pending
from particledaps.runs.progress import RunProgress
from particledaps.runs.result import Problem, Result
from particledaps.runs.watchers import ProgressHook, TrajectoryHook
from particledaps.settings.environment import device_facts, environment
from particledaps.settings.statuses import StoppedError
from particledaps.streams import ParticleStreams

T = TypeVar("T")
DROPPING = ("pruning", "restarts", "restarts_end")
"""Kinds of log rows that name diverged particles which are not in the last state any more."""


@dataclass(frozen=True)
class ReconstructionSettings:
    """What is done with every image of a run.

    Attributes:
        seed: of all streams.
        particle_ids: the particles to run.
        device: where to compute; a measurement goes there when it is its turn.
        prior_sha256: of the prior's weights, for the record.
        selection_rule: how the answer is chosen, see :data:`particledaps.evaluation.selection.RULES`.
        save_trajectory: draw trajectory figures.
        selection_margin: of ``fresh2``, see there.
    """

    seed: int
    particle_ids: list[int]
    device: torch.device
    prior_sha256: str
    selection_rule: str = "loss"
    save_trajectory: bool = True
    selection_margin: float = 0.0


class Reconstructor:
    """Runs the sampler on measurements and writes what comes out.

    Args:
        method: how one measurement is sampled.
        evaluator: metrics against a truth.
        folder: where results go.
        asked: what is to be done, and what the record says of it.
        calls: counts the calls of the prior.
        progress: of the run; without it, of a run of one image.
    """

    def __init__(
        self,
        method: Method,
        evaluator: Evaluator,
        folder: RunFolder,
        asked: ReconstructionSettings,
        calls: Calls,
        progress: RunProgress | None = None,
    ) -> None:
        self.method = method
        self.evaluator = evaluator
        self.folder = folder
        self.asked = asked
        self.calls, self.progress = calls, progress or RunProgress(1)

    def run(self, problem: Problem) -> Record:
        """Reconstruct, write the record, then pictures; a failure is recorded and does not stop other images.

        Out of memory, the particles are decoded in smaller batches. Numbers are saved before anything is drawn, and a
        picture that cannot be drawn costs no result.

        Raises:
            StoppedError: the device answers no more, so that every later image would fail.
            OSError: the results cannot be written.
        """
        problem = problem.to(self.asked.device)
        sampled = None
        try:
            sampled = self._retrying(lambda: self._sample(problem), problem)
            result, record = self._retrying(lambda: self._finish(problem, sampled), problem)
        except RuntimeError as error:  # out of memory and the like; anything else is a bug and stops the run
            traceback.print_exc()
            record = failed_record(problem, f"{type(error).__name__}: {error}")
            self.folder.save(record)
            check_device(self.asked.device)
            if sampled is not None:
                self._keep_latents(problem, sampled.state)
            return record
        floats = self._save_floats(result)
        self.folder.save_numbers(record)
        pictures, fault = self._draw(result, sampled)
        record |= {"pictures_error": fault, "files": self.folder.describe([floats, *pictures])}
        self.folder.save(record)
        return record

    def _keep_latents(self, problem: Problem, state: State) -> None:
        """What was sampled before its scores failed."""
        path = self.folder.floats_path(problem.image_id).with_name(f"{problem.image_id:05d}_latents.npz")
        with replacing(path) as temporary:
            np.savez_compressed(temporary, latents=state.z0_y.cpu().numpy(), particle_ids=np.array(state.ids))
        print(f"{problem.title}: what was sampled is kept in {path}")

    def _retrying(self, work: Callable[[], T], problem: Problem) -> T:
        """Do something; where memory runs out, again with half as many particles decoded at once."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                smaller = (self.method.prior.decode_batch or len(self.asked.particle_ids)) // 2
                if smaller < 1:
                    raise
            self.method = self.method.with_prior(replace(self.method.prior, decode_batch=smaller))
            torch.cuda.empty_cache()
            print(
                f"{problem.title}: out of memory, going on with {smaller} particles decoded at once; "
                f"decode_batch={smaller} says so from the start"
            )

    def _sample(self, problem: Problem) -> Sampled:
        clock, started = PhaseClock(self.asked.device), Seconds.now()
        calls_before = self.calls.copy()
        method, floor = self.method.for_operator(problem.operator), problem.operator.noise_floor(problem.y)
        trajectory, info = TrajectoryHook(method.num_levels), Info()
        streams, ids = ParticleStreams(self.asked.seed, problem.image_id), self.asked.particle_ids
        start, started_from = method.first_state(problem.y, streams, ids)
        first = 0 if start is None else start.level
        with self.progress.image(problem.title, method.num_levels - first) as progress:
            clock.enter(method.phases[0])
            watchers = [trajectory] if self.asked.save_trajectory else []
            watchers += [ProgressHook(progress, floor.mean.item()), ClockHook(clock)]
            state = method.sampler(clock, watchers).sample(problem.y, streams, ids, info, start)
            clock.leave()
        return Sampled(state, info, clock, trajectory, started_from, started, calls_before)

    def _finish(self, problem: Problem, sampled: Sampled) -> tuple[Result, Record]:
        result = self._evaluate(problem, sampled.state, sampled.info)
        spent = sampled.started.until_now()  # without pictures
        cost = {"seconds": spent.wall, "cpu_seconds": spent.cpu, "calls": self.calls.since(sampled.calls_before)}
        sampled.clock.note_peak()
        record = self._record(result, sampled.clock, sampled.info, cost)
        return result, record | {"start": sampled.started_from, "files": None}

    def _draw(self, result: Result, sampled: Sampled) -> tuple[list[Path], str | None]:
        """Draw what there is to see; the paths, or none and why not."""
        try:
            levels, line = [], []
            if self.asked.save_trajectory:
                shown_ids = result.particle_ids + result.diverged_ids
                levels = sampled.trajectory.decoded(self.method.prior, self.asked.device, shown_ids)
                if result.selection is not None:
                    chosen = result.particle_ids[result.selection.index]
                    line = sampled.trajectory.lineage(self.method.prior, self.asked.device, chosen)
            return draw_result(self.folder.path, result, levels, line, sampled.info.rows.get("symmetry", [])), None
        except Exception as error:  # whatever it is, the numbers are there
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{result.problem.title}: its pictures could not be drawn ({fault}); its numbers are saved")
            return [], fault

    def _evaluate(self, problem: Problem, state: State, info: Info) -> Result:
        decoded = self.method.prior.decode(state.z0_y)
        loss = problem.operator.loss(decoded, state.y)
        state, decoded, loss = (part[~state.masked] for part in (state, decoded, loss))
        alive = ~state.diverged & loss.isfinite()  # a finite latent can still decode to infinity
        images = decoded[alive].clamp(-1, 1)
        loss = loss[alive]
        ids = state.particle_id[alive].tolist()
        selection = scores = modes = None
        if ids:
            candidates = Candidates(images, loss, problem.y, self.method.selection_tau, self.asked.selection_margin)
            selection = select(self.method.prior, problem.operator, candidates, self.asked.selection_rule)
        if ids and problem.truth is not None:
            scores = self.evaluator(images, problem.truth)
            made = [row["child"] for row in info.rows.get("twins", [])]
            counts, twins = [i not in made for i in ids], has_twins(problem.operator.symmetries())
            modes = find_modes(images, problem.truth, scores.aligned["psnr"], counts, twins)
        agreed = next((row["agreed"] for row in info.rows.get("restarts_end", [])), None)
        return Result(problem, images, loss, ids, state.particle_id[~alive].tolist(), selection, scores, modes, agreed)

    def _save_floats(self, result: Result) -> Path:
        arrays = {"y": with_gaps(result.problem.operator, result.problem.y), "estimates": result.images}
        if result.problem.truth is not None:
            arrays["truth"] = result.problem.truth
        if result.problem.operator.part is not None:
            arrays[result.problem.operator.part_name] = result.problem.operator.part[None]
        numbers = {name: value.cpu().numpy() for name, value in arrays.items()}
        if isinstance(result.problem.operator, PhaseRetrieval):
            numbers |= {FORM: np.array(Convention().measurement), ORIGIN: np.array(Convention().origin)}
        target = self.folder.floats_path(result.problem.image_id)
        with replacing(target) as path:
            np.savez_compressed(
                path,
                image_ids=np.array([result.problem.image_id]),
                particle_ids=np.array(result.particle_ids, dtype=np.int64),
                **numbers,
            )
        return target

    def _record(self, result: Result, clock: PhaseClock, info: Info, cost: dict[str, Any]) -> Record:
        problem, selection = result.problem, result.selection
        floor = problem.operator.noise_floor(problem.y)
        dropped = [i for kind in DROPPING for row in info.rows.get(kind, []) for i in row["diverged"]]
        loss, floor_mean = result.loss.tolist(), floor.mean.item()
        return {
            "image_id": problem.image_id,
            "name": problem.name,
            "input": problem.source._asdict(),
            "origin": problem.origin,
            "state": "ok" if result.particle_ids else "diverged",
            "diverged_particles": sorted({*result.diverged_ids, *dropped}),
            "error": None if result.particle_ids else self.method.why_diverged(problem.y, len(self.asked.particle_ids)),
            "particle_ids": result.particle_ids,
            **self._quality(result),
            "measurement": {
                "loss": loss,
                "noise_sigma": problem.operator.noise_sigma,
                "noise": problem.noise,
                "noise_floor": floor_mean,
                "noise_floor_std": floor.std.item(),
                "excess": [value - floor_mean for value in loss],
                "pseudo_inverse_psnr_db": self._pseudo_inverse_psnr(problem),
                "fingerprint": [problem.y.double().mean().item(), problem.y.double().square().mean().sqrt().item()],
            },
            "selection": selection
            and {
                "selected_particle": result.particle_ids[selection.index],
                "symmetry": selection.symmetry,
                "rule": selection.rule,
                "scores": selection.scores,
                "plausibility": selection.plausibility,
                "symmetry_index": symmetry_index(result.images).tolist(),
                "channel_agreement": channel_agreement(result.images).tolist(),
            },
            **self.method.record(info, result.particle_ids),
            "tau": self.method.tau,
            "timing": {
                **cost,
                "per_step_seconds": clock.step_seconds,
                "phases": {n: {"seconds": p.seconds, "steps": p.steps} for n, p in clock.phases.items()},
            },
            "vram": {name: phase.peak_vram_mb for name, phase in clock.phases.items()},
            "device": device_facts(problem.y.device),
            "environment": environment(problem.y.device),
            "prior_sha256": self.asked.prior_sha256,
        }

    @staticmethod
    def _pseudo_inverse_psnr(problem: Problem) -> float | None:
        if problem.truth is None:
            return None
        plain = problem.operator.pseudo_inverse(problem.y, tuple(problem.truth.shape[1:]))
        return None if plain is None else psnr_db(plain, problem.truth).item()

    def _quality(self, result: Result) -> dict[str, Any]:
        if result.problem.truth is None:
            return {"metrics": None, "selected": None, "modes": None}
        if result.scores is None:  # every particle diverged
            with_channels = bool(self.evaluator.channel_symmetries(result.problem.truth.shape[1]))
            suffixes = ALIGNMENTS if with_channels else ALIGNMENTS[:2]
            names = [n + suffix for n in self.evaluator.names for suffix in suffixes]
            empty = {"labels": [], "coverage": 0, "twin_fit": [], "channel_fit": [], "solved": []}
            return {"metrics": {n: [] for n in names}, "selected": None, "modes": empty}
        return quality_record(result.scores, result.modes, result.selection.index, result.selection.symmetry)


@dataclass(frozen=True)
class Sampled:
    """What the sampler left of one image, and what its record needs."""

    state: State
    info: Info
    clock: PhaseClock
    trajectory: TrajectoryHook
    started_from: dict[str, Any] | None
    started: Seconds
    calls_before: Calls


probe = torch.zeros
"""Makes a tensor on a device, to see whether it still can."""


def check_device(device: torch.device) -> None:
    """Does the device still compute?

    Raises:
        StoppedError: it does not.
    """
    try:
        probe(1, device=device).add(1).item()
    except RuntimeError as error:
        raise StoppedError(f"{device} answers no more ({' '.join(str(error).split())[:200]})") from error


def failed_record(problem: Problem, error: str) -> Record:
    """The record of an image that failed."""
    return _without_result(problem.image_id, problem.name, problem.source._asdict(), "failed", error)


def skipped_record(pending: Pending, error: str) -> Record:
    """The record of an image whose input cannot be read."""
    return _without_result(pending.image_id, pending.name, None, "skipped", error)


def _without_result(image_id: int, name: str, source: dict[str, Any] | None, state: str, error: str) -> Record:
    facts = {"image_id": image_id, "name": name, "input": source, "state": state}
    return facts | {"diverged_particles": [], "error": error}


def quality_record(scores: Scores, modes: Modes, index: int, symmetry: str) -> dict[str, Any]:
    """The parts of a record that need the truth.

    Args:
        scores: metrics of all particles.
        modes: labels of all particles.
        index: row of the chosen particle.
        symmetry: symmetry applied to it.
    """
    further = {f"{n}_aligned": v for n, v in scores.aligned.items()}
    further |= {f"{n}_channel_aligned": v for n, v in scores.channel_aligned.items()}
    metrics = scores.raw | further
    selected = {n: scores.by_symmetry[symmetry][n][index] for n in scores.raw}
    selected |= {n: v[index] for n, v in further.items()}
    selected["regret_db"] = max(scores.aligned["psnr"]) - selected["psnr"]
    fits = [{"a": a, "b": b} for a, b in modes.twin_fit]
    channel_fits = [[{"a": a, "b": b} for a, b in own] for own in modes.channel_fit]
    facts = {"labels": modes.labels, "coverage": modes.coverage, "twin_fit": fits, "channel_fit": channel_fits}
    facts |= {"solved": modes.solved}
    return {"metrics": metrics, "selected": selected, "modes": facts}
