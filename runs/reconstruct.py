"""Reconstruct one measurement: sample, score, choose, draw."""

import time
import traceback
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from evaluation.metrics import Evaluator, Scores, psnr_db
from evaluation.modes import Modes, channel_agreement, find_modes, symmetry_index
from evaluation.selection import Candidates, Selection, select
from operators.operator import Operator
from priors.prior import Prior
from runs.console import ProgressHook, TrajectoryHook
from runs.cost import Calls
from runs.hook_records import optimization_record, repulsion_record, resampling_record, symmetry_record
from runs.hooks import HookPlan
from runs.phases import ClockHook, PhaseClock
from runs.plots import Snapshot, contact_sheet, lineage_figure, measurement_picture, save_png, trajectory_figure
from runs.record import Record, RunFolder
from runs.rng import ParticleStreams
from sampler import Info, LatentDAPS, SamplerSettings, State


@dataclass(frozen=True)
class Problem:
    """One measurement and what is known of it.

    Attributes:
        image_id: id in the data set.
        name: for file names and tables.
        origin: photograph, synthetic, data or measured.
        operator: of this image, with its mask or kernel.
        y: ``(1, ...)``.
        truth: ``(1, C, H, W)`` in [-1, 1], or None.
    """

    image_id: int
    name: str
    origin: str
    operator: Operator
    y: torch.Tensor
    truth: torch.Tensor | None


@dataclass(frozen=True)
class Result:
    """Reconstructions of one measurement, without diverged particles.

    Attributes:
        problem: what was reconstructed.
        images: ``(P, C, H, W)`` decoded, clipped to [-1, 1].
        loss: ``(P,)`` data loss of the decoded images, not clipped.
        particle_ids: id of each row.
        diverged_ids: ids that are missing.
        selection: the chosen answer, None if every particle diverged.
        scores: metrics against the truth, None without truth or particles.
        modes: labels against the truth, None without truth or particles.
    """

    problem: Problem
    images: torch.Tensor
    loss: torch.Tensor
    particle_ids: list[int]
    diverged_ids: list[int]
    selection: Selection | None
    scores: Scores | None
    modes: Modes | None


class Reconstructor:
    """Runs the sampler on measurements and writes what comes out.

    Args:
        prior: the prior.
        settings: of the annealing loop.
        plan: repulsion, pruning and optimisation.
        evaluator: metrics against a truth.
        folder: where results go.
        seed: of all streams.
        particle_ids: the particles to run.
        save_trajectory: draw trajectory figures.
        calls: counts the calls of ``prior``.
        selection_rule: how the answer is chosen, see :data:`evaluation.selection.RULES`.
    """

    def __init__(
        self,
        prior: Prior,
        settings: SamplerSettings,
        plan: HookPlan,
        evaluator: Evaluator,
        folder: RunFolder,
        seed: int,
        particle_ids: list[int],
        save_trajectory: bool,
        calls: Calls,
        selection_rule: str = "loss",
    ) -> None:
        self.prior, self.settings, self.evaluator = prior, settings, evaluator
        self.plan, self.calls, self.selection_rule = plan, calls, selection_rule
        self.folder, self.seed, self.particle_ids, self.save_trajectory = folder, seed, particle_ids, save_trajectory

    def run(self, problem: Problem) -> Record:
        """Reconstruct, write pictures and the record; a failure is recorded and does not stop other images."""
        try:
            record = self._run(problem)
        except RuntimeError as error:  # out of memory and the like; anything else is a bug and stops the run
            traceback.print_exc()
            record = {
                "image_id": problem.image_id,
                "name": problem.name,
                "state": "failed",
                "diverged_particles": [],
                "error": f"{type(error).__name__}: {error}",
            }
        self.folder.save(record)
        return record

    def _run(self, problem: Problem) -> Record:
        device, clock, started = problem.y.device, PhaseClock(problem.y.device), time.perf_counter()
        calls_before = self.calls.copy()
        trajectory, info = TrajectoryHook(self.settings.num_levels), Info()
        operator, plan = problem.operator, replace(self.plan, operator=problem.operator)
        floor = operator.noise_floor(problem.y)
        streams, start, started_from = ParticleStreams(self.seed, problem.image_id), None, None
        if plan.warm_start is not None:
            start, started_from = plan.warm_start(problem.y, streams, self.particle_ids)
        first = 0 if start is None else start.level
        with tqdm(total=self.settings.num_levels - first, desc=problem.name, unit="level") as bar:
            clock.enter(plan.phases[0])
            hooks = plan.hooks(problem.y, clock)
            hooks += [trajectory] if self.save_trajectory else []
            hooks += [ProgressHook(bar, floor.mean.item()), ClockHook(clock)]
            loop = LatentDAPS(self.prior, operator, self.settings, hooks)
            state = loop.sample(problem.y, streams, self.particle_ids, info, start)
            clock.leave()
        result = self._evaluate(problem, state)
        cost = {"seconds": time.perf_counter() - started, "calls": self.calls.since(calls_before)}  # without pictures
        self._save_floats(result)
        levels, line = [], []
        if self.save_trajectory:
            levels = trajectory.decoded(self.prior, device, result.particle_ids + result.diverged_ids)
            if result.selection is not None:
                chosen = result.particle_ids[result.selection.index]
                line = trajectory.lineage(self.prior, device, chosen)
        self._draw(result, levels, line)
        return self._record(result, clock, info, cost) | {"start": started_from}

    def _evaluate(self, problem: Problem, state: State) -> Result:
        decoded = self.prior.decode(state.z0_y)
        loss = problem.operator.loss(decoded, state.y)
        state, decoded, loss = (part[~state.masked] for part in (state, decoded, loss))
        alive = ~state.diverged & loss.isfinite()  # a finite latent can still decode to infinity
        images, loss, ids = decoded[alive].clamp(-1, 1), loss[alive], state.particle_id[alive].tolist()
        selection = scores = modes = None
        if ids:
            candidates = Candidates(images, loss, problem.y, self.plan.optimization_tau)
            selection = select(self.prior, problem.operator, candidates, self.selection_rule)
        if ids and problem.truth is not None:
            scores = self.evaluator(images, problem.truth)
            modes = find_modes(images, problem.truth, scores.aligned["psnr"])
        return Result(problem, images, loss, ids, state.particle_id[~alive].tolist(), selection, scores, modes)

    def _save_floats(self, result: Result) -> None:
        arrays = {"y": result.problem.y, "estimates": result.images}
        if result.problem.truth is not None:
            arrays["truth"] = result.problem.truth
        if result.problem.operator.part is not None:
            arrays[result.problem.operator.part_name] = result.problem.operator.part[None]
        numbers = {name: value.cpu().numpy() for name, value in arrays.items()}
        np.savez_compressed(
            self.folder.floats_path(result.problem.image_id),
            image_ids=np.array([result.problem.image_id]),
            particle_ids=np.array(result.particle_ids, dtype=np.int64),
            **numbers,
        )

    def _draw(self, result: Result, levels: list[Snapshot], line: list[tuple[int, torch.Tensor]]) -> None:
        problem, folder = result.problem, self.folder.path
        for particle, image in zip(result.particle_ids, result.images, strict=True):
            save_png(folder / "samples" / f"{problem.image_id:05d}_particle{particle}.png", image)
        tiles = [] if problem.truth is None else [(problem.truth[0], "truth", False)]
        picture = problem.operator.picture(problem.y[0])
        title = "measurement (log)" if picture is None else "measurement"
        tiles.append((measurement_picture(problem.y[0], picture), title, False))
        for row, particle in enumerate(result.particle_ids):
            chosen = result.selection.index == row
            tiles.append((result.images[row], self._title(result, row, particle), chosen))
        if result.selection is not None:
            answer = self._answer(result)
            save_png(folder / "samples" / f"{problem.image_id:05d}_selected.png", answer)
            chosen_id = result.particle_ids[result.selection.index]
            tiles.append((answer, f"answer, no truth used\nparticle {chosen_id}, {result.selection.symmetry}", True))
        heading = f"{problem.name} ({problem.origin}), image {problem.image_id}"
        contact_sheet(folder / "sheets" / f"{problem.image_id:05d}.png", [tiles], heading)
        if levels:
            trajectory_figure(folder / "trajectory" / f"{problem.image_id:05d}.png", levels)
        if len(line) > 1:
            titled = [(image.clamp(-1, 1), self._ancestor_title(problem, i, image)) for i, image in line]
            lineage_figure(folder / "trajectory" / f"{problem.image_id:05d}_lineage.png", titled, problem.truth)

    @staticmethod
    def _title(result: Result, row: int, particle: int) -> str:
        if result.scores is None:
            return f"particle {particle}\nloss {result.loss[row].item():.1f}"
        raw, aligned = result.scores.raw["psnr"][row], result.scores.aligned["psnr"][row]
        return f"particle {particle} [{result.modes.labels[row]}]\nraw {raw:.1f}, aligned {aligned:.1f} dB"

    @staticmethod
    def _ancestor_title(problem: Problem, particle: int, image: torch.Tensor) -> str:
        if problem.truth is None:
            return f"particle {particle}"
        twins = (symmetry.apply(image[None].clamp(-1, 1)) for symmetry in problem.operator.symmetries())
        aligned = max(psnr_db(twin, problem.truth).item() for twin in twins)
        return f"particle {particle}\naligned {aligned:.1f} dB"

    def _answer(self, result: Result) -> torch.Tensor:
        symmetry = next(s for s in result.problem.operator.symmetries() if s.name == result.selection.symmetry)
        return symmetry.apply(result.images[result.selection.index][None])[0]

    def _record(self, result: Result, clock: PhaseClock, info: Info, cost: dict[str, Any]) -> Record:
        problem, selection = result.problem, result.selection
        floor, pruned = problem.operator.noise_floor(problem.y), next(iter(info.rows.get("pruning", [])), None)
        dropped = [i for kind in ("pruning", "restarts") for row in info.rows.get(kind, []) for i in row["diverged"]]
        loss, floor_mean = result.loss.tolist(), floor.mean.item()
        return {
            "image_id": problem.image_id,
            "name": problem.name,
            "origin": problem.origin,
            "state": "ok" if result.particle_ids else "diverged",
            "diverged_particles": sorted({*result.diverged_ids, *dropped}),
            "error": None,
            "particle_ids": result.particle_ids,
            **self._quality(result),
            "measurement": {
                "loss": loss,
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
            "repulsion": repulsion_record(self.plan, info),
            "symmetry": symmetry_record(self.plan, info),
            "pruning": pruned,
            "restarts": info.rows.get("restarts"),
            "resampling": resampling_record(self.plan, info),
            "optimization": optimization_record(info, result.particle_ids),
            "tau": self.settings.tau,
            "timing": {
                **cost,
                "per_step_seconds": clock.step_seconds,
                "phases": {n: {"seconds": p.seconds, "steps": p.steps} for n, p in clock.phases.items()},
            },
            "vram": {name: phase.peak_vram_mb for name, phase in clock.phases.items()},
            "device": device_facts(problem.y.device),
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
            names = [n + suffix for n in self.evaluator.names for suffix in ("", "_aligned")]
            empty = {"labels": [], "coverage": 0, "twin_fit": [], "channel_fit": [], "solved": []}
            return {"metrics": {n: [] for n in names}, "selected": None, "modes": empty}
        return quality_record(result.scores, result.modes, result.selection.index, result.selection.symmetry)


def quality_record(scores: Scores, modes: Modes, index: int, symmetry: str) -> dict[str, Any]:
    """The parts of a record that need the truth.

    Args:
        scores: metrics of all particles.
        modes: labels of all particles.
        index: row of the chosen particle.
        symmetry: symmetry applied to it.
    """
    metrics = {n: scores.raw[n] for n in scores.raw} | {f"{n}_aligned": v for n, v in scores.aligned.items()}
    selected = {n: scores.by_symmetry[symmetry][n][index] for n in scores.raw}
    selected |= {f"{n}_aligned": v[index] for n, v in scores.aligned.items()}
    selected["regret_db"] = max(scores.aligned["psnr"]) - selected["psnr"]
    fits = [{"a": a, "b": b} for a, b in modes.twin_fit]
    channel_fits = [[{"a": a, "b": b} for a, b in own] for own in modes.channel_fit]
    facts = {"labels": modes.labels, "coverage": modes.coverage, "twin_fit": fits, "channel_fit": channel_fits}
    facts |= {"solved": modes.solved}
    return {"metrics": metrics, "selected": selected, "modes": facts}


def device_facts(device: torch.device) -> dict[str, str | None]:
    """Type and name of a device, for the record."""
    if device.type == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name(device)}
    return {"type": device.type, "name": _processor_name()}


def _processor_name() -> str | None:
    try:
        with open("/proc/cpuinfo") as handle:
            return next((line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")), None)
    except OSError:
        return None
