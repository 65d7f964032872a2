"""One start of ``posterior_sample.py``: load what is needed, look at what is there, do what is left."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from marginal_noise import NoisePilot
from particledaps.checks import DataError, SettingsError
from particledaps.diffusion.covariance import CovarianceTable
from particledaps.evaluation.lpips import LpipsError, read_lpips
from particledaps.evaluation.metrics import Evaluator
from particledaps.names import shown
from particledaps.operators.operator import Operator
from particledaps.particles.clean_estimate import measured_covariance, measured_levels
from particledaps.priors.fingerprint import prior_sha256
from particledaps.priors.prior import Prior
from particledaps.runs.calls import Calls, count_calls
from particledaps.runs.finished import Missing, report
from particledaps.runs.folder import RunFolder
from particledaps.runs.kept_covariance import COVARIANCE, keep, read_kept
from particledaps.runs.pending import Pending
from particledaps.runs.problems import Inputs, noise_line
from particledaps.runs.progress import RunProgress
from particledaps.runs.reconstruct import ReconstructionSettings, Reconstructor, skipped_record
from particledaps.runs.result import Problem
from particledaps.runs.resume import SumsOf, check_weights, folder_ids, is_finished, other_environment, set_stale_aside
from particledaps.settings.build import build_operator, build_prior
from particledaps.settings.custom import check_custom_prior
from particledaps.settings.device import choose_device, slow_precision
from particledaps.settings.environment import environment, keep_threads
from particledaps.settings.family import followed_config
from particledaps.settings.presets import NAME, preset_text
from particledaps.settings.statuses import StoppedError
from plan import Plan, build_plan, loop_settings
from run_settings import RunSettings, follow_family, is_to_be_measured, preset_made_for, validate, with_preset
from tuning import tune


@dataclass(frozen=True)
class Started:
    """A run whose inputs were looked at and whose folder is open.

    Attributes:
        folder: where its results go.
        asked: the images.
        reconstructor: what works on them.
        pilot: finds noise levels that nobody gave.
        sums_now: checksums of the inputs.
    """

    folder: RunFolder
    asked: list[Pending]
    reconstructor: Reconstructor
    pilot: NoisePilot
    sums_now: SumsOf


def sample(settings: RunSettings, config: dict) -> Missing:
    """Run every image that is not finished yet, and print the table.

    Returns:
        State and error of each image of this run without an answer.

    Raises:
        SettingsError, DataError, PriorError: before any result is written.
        OSError: the results cannot be written (any more); what is finished stays.
        StoppedError: the device has no memory for the prior, or answers no more.
    """
    validate(with_preset(settings))
    device = choose_device(settings.device, settings.gpu, settings.use_tpu)
    say(slow_precision(settings.precision, device))
    try:
        run = start(settings, config, device)
    except torch.OutOfMemoryError as error:
        raise StoppedError(
            f"out of memory while the prior was loaded ({' '.join(str(error).split())[:160]}): use precision=bfloat16 "
            "or float16, or a device with more memory (gpu=N)"
        ) from error
    say(*what_is_there(run.folder, run.asked, run.sums_now, device))
    try:
        with RunProgress(len(run.asked)) as run.reconstructor.progress:
            for pending in run.asked:
                work_on(pending, run)
    finally:  # after Ctrl-C too: the file covers every record, and no image is claimed any more
        run.folder.give_back_claims()
        run.folder.save_metrics()
    return report(run.folder, run.asked)


def start(asked_for: RunSettings, config: dict, device: torch.device) -> Started:
    """Load the prior, look at every input, measure what is left open, and only then open the folder."""
    settings, own_config = followed(with_preset(asked_for), config)
    folder = RunFolder(settings.save_dir, settings.name, own_config)
    if is_to_be_measured(asked_for) and folder.is_begun:
        raise SettingsError(f"preset=auto: {folder.path} holds a run without a preset of its own; choose another name=")
    ids = folder_ids(settings.data, folder)
    say(keep_threads([r.get("environment") or {} for r in folder.summaries()]))
    operator, calls = build_operator(settings.task), Calls()
    prior, weights = load_prior(settings, folder, device, calls)
    inputs = Inputs(settings.data, settings.task, settings.seed, prior, operator, ids)
    asked, pilot = inputs.find(settings.on_error), NoisePilot(prior, device)
    if is_to_be_measured(asked_for):
        tune_preset(asked_for, folder, prior, tuned_for(operator, asked, pilot), device)
        settings, own_config = followed(with_preset(asked_for), config)
        validate(settings)
        folder = RunFolder(settings.save_dir, settings.name, own_config)
    loop = loop_settings(settings, prior.is_pixel)
    covariance = kept_covariance(settings, folder, prior, weights, loop.path, device)
    plan = build_plan(settings, prior, operator, replace(loop, covariance=covariance), device)
    reconstructor = prepare(settings, plan, folder, weights, calls)
    folder.open()
    if covariance is not None:
        keep(covariance, folder.path / COVARIANCE, weights)
    if ids is not None:
        folder.keep_files(ids)
    return Started(folder, asked, reconstructor, pilot, inputs.sums_now)


def tune_preset(
    asked_for: RunSettings, folder: RunFolder, prior: Prior, operator: Operator, device: torch.device
) -> None:
    """Measure what ``preset=auto`` stands for, and keep it in the run's folder."""
    tuned = tune(prior, operator, device)
    text = preset_text(tuned.values, tuned.measured, preset_made_for(asked_for))
    folder.keep_once(NAME, text, lambda: not is_to_be_measured(asked_for))
    say(*tuned.lines())


def followed(settings: RunSettings, config: dict) -> tuple[RunSettings, dict]:
    """Settings and configuration with what follows from the prior's family."""
    own = follow_family(settings)
    return own, followed_config(config, own.model, own.sampler)


def with_noise(problem: Problem, pilot: NoisePilot) -> Problem:
    """The problem with the noise level that the pilot finds, where its measurement shows none.

    Raises:
        DataError: nothing came out of it.
    """
    if problem.noise not in ("silent", "symmetrised"):
        return problem
    if problem.noise == "symmetrised":
        say(f"{problem.title}: conjugate entries are equal to rounding, as after symmetrising: half of them count")
    try:
        sigma = pilot(problem.operator, problem.to(pilot.device).y, problem.image_id)
    except ValueError as error:
        raise DataError(
            f"image {problem.image_id}: task.noise_sigma=auto: {error}; say task.noise_sigma=NUMBER"
        ) from error
    return replace(problem, operator=problem.operator.with_noise(sigma), noise="effective")


def tuned_for(operator: Operator, asked: list[Pending], pilot: NoisePilot) -> Operator:
    """The operator at the noise level of the first measurement that can be read."""
    for pending in asked:
        try:
            return operator.with_noise(with_noise(pending.load(keep=True), pilot).operator.noise_sigma)
        except DataError:
            continue
    return operator


def load_prior(settings: RunSettings, folder: RunFolder, device: torch.device, calls: Calls) -> tuple[Prior, str]:
    """The prior, its calls counted, and the checksum of its weights."""
    loaded = build_prior(settings.model, settings.compat, settings.precision, settings.decode_batch, device)
    if settings.model.kind == "custom":
        count = len(settings.particle_ids or range(settings.num_samples))
        check_custom_prior(loaded, settings.model.target, count, device)
    weights = prior_sha256(loaded)
    check_weights(folder, weights, settings.model.path)
    return count_calls(loaded, calls), weights


def kept_covariance(
    settings: RunSettings, folder: RunFolder, prior: Prior, weights: str, path: torch.Tensor, device: torch.device
) -> CovarianceTable | None:
    """What ``sampler.mcmc.covariance=measured`` measures, or has measured at an earlier start; None without it."""
    chain = settings.sampler.mcmc
    if chain.covariance != "measured":
        return None
    in_pixels = chain.space == "pixel"
    sigmas = measured_levels(path.tolist())
    known = read_kept(folder.path / COVARIANCE, weights, sigmas, prior.image_shape if in_pixels else prior.latent_shape)
    return known or measured_covariance(prior, path, in_pixels, device)


def prepare(settings: RunSettings, plan: Plan, folder: RunFolder, weights: str, calls: Calls) -> Reconstructor:
    """Metrics of a run, and what runs it."""
    device, operator = plan.setup.device, plan.setup.operator
    lpips = None
    try:
        lpips = read_lpips(device)
    except LpipsError as error:
        print(f"LPIPS is left out: {error}")
    return Reconstructor(
        plan,
        Evaluator(operator.symmetries(), lpips, operator.channel_symmetries),
        folder,
        ReconstructionSettings(
            settings.seed,
            settings.particle_ids or list(range(settings.num_samples)),
            device,
            weights,
            settings.selection_rule,
            settings.save_trajectory,
            settings.selection_margin,
        ),
        calls,
    )


def say(*lines: str | None) -> None:
    """Print what there is to say."""
    for line in filter(None, lines):
        print(line)


def what_is_there(folder: RunFolder, asked: list[Pending], sums: SumsOf, device: torch.device) -> list[str]:
    """What of an earlier start counts, and what does not."""
    lines = [f"{path} cannot be read and counts as not there" for path in folder.damaged()]
    lines += set_stale_aside(folder, asked, sums)
    goes_on = any(not is_finished(folder.summary(p.image_id), p) for p in asked)
    if goes_on and (other := other_environment(folder.summaries(), environment(device))):
        lines.append(
            f"this run was begun in another environment ({'; '.join(other)}): numbers may differ in their rounding"
        )
    return lines


def work_on(pending: Pending, run: Started) -> None:
    """Reconstruct one image, unless it is finished, cannot be read, or another process works on it."""
    folder, reconstructor = run.folder, run.reconstructor
    if is_finished(folder.summary(pending.image_id), pending):
        leave(pending, "finished before, skipped", reconstructor)
        return
    with folder.claim(pending.image_id) as mine:
        if mine is not True:
            leave(pending, f"left to {mine or 'another process'}, which works on it", reconstructor)
        elif is_finished(folder.summary(pending.image_id), pending):
            leave(pending, "finished by another process, skipped", reconstructor)
        else:
            try:
                problem = with_noise(pending.load(), run.pilot)
            except DataError as error:
                leave(pending, f"left out: {shown(str(error))}", reconstructor)
                folder.save(skipped_record(pending, str(error)))
                return
            say(noise_line(problem))
            reconstructor.run(problem)


def leave(pending: Pending, why: str, reconstructor: Reconstructor) -> None:
    """Say why an image needs no work here."""
    say(f"{pending.title}: {why}")
    reconstructor.progress.skip()
