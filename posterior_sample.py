"""Reconstruct images from measurements with a diffusion prior.

Without arguments this is the demo: phase retrieval of a photograph and of synthetic cats on the embedded prior.

    python posterior_sample.py                                        # the demo
    python posterior_sample.py data=folder data.dir=MY_IMAGES name=mine sampler=latent_daps_hmc
    python posterior_sample.py --help
"""

from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from evaluation.metrics import Evaluator, load_lpips
from operators.operator import Operator
from priors.prior import Prior, PriorError
from runs.build import build_operator, build_prior, build_sampler_settings
from runs.checks import SettingsError
from runs.command_line import CONFIG_DIR, FAILED, INTERRUPTED, fail, register, run
from runs.console import results_table
from runs.cost import Calls, count_calls
from runs.custom import check_custom_operator, check_custom_prior
from runs.device import choose_device
from runs.family import follow_family, followed_config
from runs.hooks import build_hook_plan
from runs.images import DataError, load_images, load_measurements
from runs.operators import measurement_shape, operator_of_image, operators_of_measurements
from runs.reconstruct import Reconstructor
from runs.record import RunFolder
from runs.result import Problem
from runs.rng import measurement_generator
from runs.settings import RunSettings
from runs.validation import validate

PROGRAM = "posterior_sample.py"
NOISE_TOLERANCE = 0.1
register("run_settings", RunSettings)


def load_problems(settings: RunSettings, prior: Prior, operator: Operator, device: torch.device) -> list[Problem]:
    """The measurements of this run: given ones, or simulated from images.

    Raises:
        SettingsError, DataError: the operator or the data cannot be used.
    """
    data = settings.data
    if settings.task.kind == "custom":
        check_custom_operator(operator, prior.image_shape)
    if data.measurement is not None:
        shape = measurement_shape(operator, prior.image_shape)
        y, ids = load_measurements(Path(data.measurement), shape, data.start_id, data.end_id)
        operators = operators_of_measurements(operator, Path(data.measurement), ids, prior.image_shape)
        given = zip(ids, y.to(device), operators, strict=True)
        return [Problem(i, f"measurement_{i:05d}", "measured", o, m[None], None) for i, m, o in given]
    images = load_images(data.kind, data.dir, data.path, data.split, data.start_id, data.end_id, prior.image_shape)
    problems = []
    for x, image_id, name, origin in zip(images.pixels, images.ids, images.names, images.origins, strict=True):
        truth = x[None]
        own = operator_of_image(operator, settings.seed, image_id, prior.image_shape)
        y = own.measure(truth, measurement_generator(settings.seed, image_id))
        problems.append(Problem(image_id, name, origin, own, y.to(device), truth.to(device)))
    return problems


def warn_of_noise(problems: list[Problem]) -> None:
    """Say which measurements reveal another noise level than the configured one."""
    for problem in problems:
        operator = problem.operator
        found = operator.estimated_noise_sigma(problem.y)
        if found is not None and abs(found.item() / operator.noise_sigma - 1) > NOISE_TOLERANCE:
            print(
                f"{problem.name}: the measurement's noise looks like {found.item():.3g}, but task.noise_sigma is "
                f"{operator.noise_sigma:g}; the noise floor will be off"
            )


def sample(settings: RunSettings, config: dict) -> list[int]:
    """Run every image that is not finished yet, and print the table.

    Returns:
        Ids of the images that failed.

    Raises:
        SettingsError, DataError, PriorError: before any result is written.
    """
    validate(settings)
    settings = follow_family(settings)
    config = followed_config(config, settings)
    device = choose_device(settings)
    folder = RunFolder(settings.save_dir, settings.name, config)
    operator = build_operator(settings.task)
    calls = Calls()
    loaded = build_prior(settings, device)
    particles = settings.particle_ids or list(range(settings.num_samples))
    if settings.model.kind == "custom":
        check_custom_prior(loaded, settings.model.target, len(particles), device)
    sampler_settings = build_sampler_settings(settings, loaded)
    prior = count_calls(loaded, calls)
    plan = build_hook_plan(settings, prior, operator, sampler_settings.path, device)
    problems = load_problems(settings, prior, operator, device)
    lpips = load_lpips(device)
    if lpips is None:
        print("LPIPS is left out: its weights are not on this machine (bash download.sh lpips)")
    warn_of_noise(problems)
    folder.open()
    reconstructor = Reconstructor(
        prior,
        sampler_settings,
        plan,
        Evaluator(operator.symmetries(), lpips, operator.channel_symmetries),
        folder,
        settings.seed,
        list(particles),
        settings.save_trajectory,
        calls,
        settings.selection_rule,
    )
    try:
        for problem in problems:
            if folder.has(problem.image_id):
                print(f"{problem.name}: finished before, skipped")
            else:
                reconstructor.run(problem)
    finally:  # after Ctrl-C too: the file covers every record
        metrics = folder.save_metrics()
    print("\n" + results_table(metrics, {p.image_id: p.name for p in problems}))
    print(f"\nresults in {folder.path}: metrics.json, sheets/, trajectory/, samples/, floats/")
    return [r["image_id"] for r in metrics["status"]["per_image"] if r["state"] == "failed"]


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="config")
def main(config: DictConfig) -> None:
    """Compose, check, run; errors end in one sentence and a non-zero status."""
    try:
        failed = sample(OmegaConf.to_object(config), OmegaConf.to_container(config, resolve=True))
    except (SettingsError, DataError, PriorError) as error:
        fail(PROGRAM, str(error))
    except KeyboardInterrupt:
        fail(PROGRAM, "interrupted; finished images are kept, the same command goes on", INTERRUPTED)
    if failed:
        ids = ", ".join(map(str, failed))
        fail(PROGRAM, f"image {ids} failed (metrics.json, status, says why); the same command tries again", FAILED)


if __name__ == "__main__":
    run(PROGRAM, "config", main)
