"""Reconstruct one measurement: sample, score, choose, record."""

import time
import traceback
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from evaluation.metrics import Evaluator, Scores, psnr_db
from evaluation.modes import Modes, channel_agreement, find_modes, has_twins, symmetry_index
from evaluation.selection import Candidates, select
from operators.magnitudes import Convention
from operators.phase_retrieval import PhaseRetrieval
from priors.prior import Prior
from runs.console import ProgressHook, TrajectoryHook
from runs.cost import Calls
from runs.drawing import draw_result
from runs.environment import device_facts, environment
from runs.files import replacing
from runs.hook_records import optimization_record, repulsion_record, resampling_record, symmetry_record
from runs.hooks import HookPlan
from runs.measurements import FORM, ORIGIN
from runs.metrics_file import ALIGNMENTS, Record
from runs.phases import ClockHook, PhaseClock
from runs.record import RunFolder
from runs.result import Problem, Result
from runs.rng import ParticleStreams
from sampler import Info, LatentDAPS, SamplerSettings, State

DROPPING = ("pruning", "restarts", "restarts_end")
"""Kinds of log rows that name diverged particles which are not in the last state any more."""


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
        prior_sha256: of its weights, for the record.
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
        prior_sha256: str,
        selection_rule: str = "loss",
    ) -> None:
        self.prior, self.settings, self.evaluator = prior, settings, evaluator
        self.plan, self.calls, self.selection_rule = plan, calls, selection_rule
        self.prior_sha256 = prior_sha256
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
                "input": problem.source._asdict(),
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
            state = loop.sample(problem.y, streams, self.particle_ids, info, start, plan.num_samples)
            clock.leave()
        result = self._evaluate(problem, state, info)
        cost = {"seconds": time.perf_counter() - started, "calls": self.calls.since(calls_before)}  # without pictures
        self._save_floats(result)
        levels, line = [], []
        if self.save_trajectory:
            levels = trajectory.decoded(self.prior, device, result.particle_ids + result.diverged_ids)
            if result.selection is not None:
                chosen = result.particle_ids[result.selection.index]
                line = trajectory.lineage(self.prior, device, chosen)
        draw_result(self.folder.path, result, levels, line, info.rows.get("symmetry", []))
        return self._record(result, clock, info, cost) | {"start": started_from}

    def _evaluate(self, problem: Problem, state: State, info: Info) -> Result:
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
            made = [row["child"] for row in info.rows.get("twins", [])]
            counts, twins = [i not in made for i in ids], has_twins(problem.operator.symmetries())
            modes = find_modes(images, problem.truth, scores.aligned["psnr"], counts, twins)
        agreed = next((row["agreed"] for row in info.rows.get("restarts_end", [])), None)
        return Result(problem, images, loss, ids, state.particle_id[~alive].tolist(), selection, scores, modes, agreed)

    def _save_floats(self, result: Result) -> None:
        arrays = {"y": result.problem.y, "estimates": result.images}
        if result.problem.truth is not None:
            arrays["truth"] = result.problem.truth
        if result.problem.operator.part is not None:
            arrays[result.problem.operator.part_name] = result.problem.operator.part[None]
        numbers = {name: value.cpu().numpy() for name, value in arrays.items()}
        if isinstance(result.problem.operator, PhaseRetrieval):
            numbers |= {FORM: np.array(Convention().measurement), ORIGIN: np.array(Convention().origin)}
        with replacing(self.folder.floats_path(result.problem.image_id)) as path:
            np.savez_compressed(
                path,
                image_ids=np.array([result.problem.image_id]),
                particle_ids=np.array(result.particle_ids, dtype=np.int64),
                **numbers,
            )

    def _record(self, result: Result, clock: PhaseClock, info: Info, cost: dict[str, Any]) -> Record:
        problem, selection = result.problem, result.selection
        floor, pruned = problem.operator.noise_floor(problem.y), next(iter(info.rows.get("pruning", [])), None)
        dropped = [i for kind in DROPPING for row in info.rows.get(kind, []) for i in row["diverged"]]
        loss, floor_mean = result.loss.tolist(), floor.mean.item()
        return {
            "image_id": problem.image_id,
            "name": problem.name,
            "input": problem.source._asdict(),
            "origin": problem.origin,
            "state": "ok" if result.particle_ids else "diverged",
            "diverged_particles": sorted({*result.diverged_ids, *dropped}),
            "error": None if result.particle_ids else self._why_diverged(problem),
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
            "restarts_end": next(iter(info.rows.get("restarts_end", [])), None),
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
            "environment": environment(problem.y.device),
            "prior_sha256": self.prior_sha256,
        }

    def _why_diverged(self, problem: Problem) -> str:
        """The likely reason why every particle of an image became non-finite, and what to do."""
        prior, sigma, chain = self.prior, self.settings.path[0], self.settings.chain
        z = sigma * torch.ones(len(self.particle_ids), *prior.latent_shape, device=problem.y.device)
        with torch.no_grad():
            denoised = prior.denoiser(z, sigma.to(z))
        decoded = prior.decode(denoised)
        if not (denoised.isfinite().all() and decoded.isfinite().all()):
            return (
                "every particle diverged: the prior's networks return numbers that are not finite (damaged weights, "
                "or too little range: precision=float32)"
            )
        if not problem.operator.loss(decoded, problem.y.expand(len(z), *problem.y.shape[1:])).isfinite().all():
            largest = problem.y.abs().max().item()
            return f"every particle diverged: the measurement is out of scale (values up to {largest:.3g})"
        return (
            f"every particle diverged: the chain is unstable here; lower sampler.mcmc.step_size={chain.step_size:g}, "
            f"or raise sampler.mcmc.tau={self.settings.tau:g}"
        )

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
