"""Reconstruct images from measurements with a diffusion prior.

Without arguments this is the demo: phase retrieval of a photograph and of synthetic cats on the embedded prior.

    python posterior_sample.py                                        # the demo
    python posterior_sample.py data=folder data.dir=MY_IMAGES name=mine sampler=latent_daps_hmc
    python posterior_sample.py --help
"""

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from evaluation.lpips import LpipsError, read_lpips
from evaluation.metrics import Evaluator
from operators.operator import Operator
from priors.fingerprint import prior_sha256
from priors.prior import PriorError
from runs.build import build_operator, build_prior, build_sampler_settings
from runs.checks import DataError, SettingsError
from runs.command_line import CONFIG_DIR, FAILED, INTERRUPTED, NOTHING, fail, register, run
from runs.console import results_table
from runs.cost import Calls, count_calls
from runs.custom import check_custom_prior
from runs.device import choose_device
from runs.environment import environment, keep_threads
from runs.family import follow_family, followed_config
from runs.hooks import build_hook_plan
from runs.problems import SumsOf, folder_ids, load_problems, noise_warnings, sums_now
from runs.reconstruct import Reconstructor
from runs.record import RunFolder
from runs.result import Problem
from runs.resume import check_weights, is_finished, other_environment, set_replaced_aside
from runs.settings import RunSettings
from runs.validation import validate

PROGRAM = "posterior_sample.py"
register("run_settings", RunSettings)


def sample(settings: RunSettings, config: dict) -> dict[int, tuple[str, str]]:
    """Run every image that is not finished yet, and print the table.

    Returns:
        State and error of each image of this run without an answer.

    Raises:
        SettingsError, DataError, PriorError: before any result is written.
    """
    validate(settings)
    settings = follow_family(settings)
    config = followed_config(config, settings)
    device = choose_device(settings)
    folder = RunFolder(settings.save_dir, settings.name, config)
    ids = folder_ids(settings.data, folder)
    say(keep_threads([r.get("environment") or {} for r in folder.records()]))
    operator = build_operator(settings.task)
    reconstructor = prepare(settings, operator, folder, device)
    problems = load_problems(settings, reconstructor.prior, operator, device, ids)
    say(*noise_warnings(problems))
    folder.open()
    if ids is not None:
        folder.keep_files(ids)
    say(*what_is_there(folder, problems, sums_now(settings, reconstructor.prior, operator, ids), device))
    try:
        for problem in problems:
            work_on(problem, folder, reconstructor)
    finally:  # after Ctrl-C too: the file covers every record
        metrics = folder.save_metrics()
    print("\n" + results_table(metrics, {p.image_id: p.name for p in problems}))
    print(f"\nresults in {folder.path}: metrics.json, sheets/, trajectory/, samples/, floats/")
    asked = {p.image_id for p in problems}
    rows = [r for r in metrics["status"]["per_image"] if r["image_id"] in asked and r["state"] != "ok"]
    return {r["image_id"]: (r["state"], r["error"] or r["state"]) for r in rows}


def prepare(settings: RunSettings, operator: Operator, folder: RunFolder, device: torch.device) -> Reconstructor:
    """Prior, sampler, hooks and metrics of a run."""
    loaded, calls = build_prior(settings, device), Calls()
    particles = settings.particle_ids or list(range(settings.num_samples))
    if settings.model.kind == "custom":
        check_custom_prior(loaded, settings.model.target, len(particles), device)
    weights = prior_sha256(loaded)
    check_weights(folder, weights, settings.model.path)
    sampler_settings = build_sampler_settings(settings, loaded)
    prior = count_calls(loaded, calls)
    lpips = None
    try:
        lpips = read_lpips(device)
    except LpipsError as error:
        print(f"LPIPS is left out: {error}")
    return Reconstructor(
        prior,
        sampler_settings,
        build_hook_plan(settings, prior, operator, sampler_settings.path, device),
        Evaluator(operator.symmetries(), lpips, operator.channel_symmetries),
        folder,
        settings.seed,
        particles,
        settings.save_trajectory,
        calls,
        weights,
        settings.selection_rule,
    )


def say(*lines: str | None) -> None:
    """Print what there is to say."""
    for line in filter(None, lines):
        print(line)


def what_is_there(folder: RunFolder, problems: list[Problem], sums: SumsOf, device: torch.device) -> list[str]:
    """What of an earlier start counts, and what does not."""
    lines = [f"{path} cannot be read and counts as not there" for path in folder.damaged()]
    lines += set_replaced_aside(folder, problems, sums)
    if other := other_environment(folder.records(), environment(device)):
        lines.append(
            f"this run was begun in another environment ({'; '.join(other)}): numbers may differ in their rounding"
        )
    return lines


def work_on(problem: Problem, folder: RunFolder, reconstructor: Reconstructor) -> None:
    """Reconstruct one image, unless it is finished or another process works on it."""
    if is_finished(folder.record(problem.image_id), problem):
        say(f"{problem.name}: finished before, skipped")
        return
    with folder.claim(problem.image_id) as mine:
        if mine is not True:
            say(f"{problem.name}: left to {mine or 'another process'}, which works on it")
        elif is_finished(folder.record(problem.image_id), problem):
            say(f"{problem.name}: finished by another process, skipped")
        else:
            reconstructor.run(problem)


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
def main(config: DictConfig) -> None:
    """Compose, check, run; errors end in one sentence and a non-zero status."""
    try:
        missing = sample(OmegaConf.to_object(config), OmegaConf.to_container(config, resolve=True))
    except (SettingsError, DataError, PriorError) as error:
        fail(PROGRAM, str(error))
    except KeyboardInterrupt:
        fail(PROGRAM, "interrupted; finished images are kept, the same command goes on", INTERRUPTED)
    failed = [i for i, (state, _) in missing.items() if state == "failed"]
    if failed:
        ids = ", ".join(map(str, failed))
        fail(PROGRAM, f"image {ids} failed (metrics.json, status, says why); the same command tries again", FAILED)
    if missing:
        ids, (_, reason) = ", ".join(map(str, missing)), next(iter(missing.values()))
        fail(PROGRAM, f"nothing came out of image {ids}: {reason}", NOTHING)


if __name__ == "__main__":
    run(PROGRAM, "config", main)
