"""Checks of the configuration: each runs before a model is loaded, and everything they find is reported at once."""

from __future__ import annotations

from particledaps.checks import Checks
from particledaps.diffusion.mcmc import KERNELS
from particledaps.diffusion.pfode import SOLVERS
from particledaps.operators.magnitudes import FORMS, ORIGINS
from particledaps.paths.schedules import ENDS, PATHS
from particledaps.priors.asked_conditions import interval_fault
from particledaps.settings.device import DEVICES
from particledaps.settings.schema import (
    AUTO,
    FOLDER_KINDS,
    AnnealingSettings,
    ChainConfig,
    CompatSettings,
    DataSettings,
    ModelSettings,
    OdeSettings,
    TaskSettings,
    operator_arguments,
)
from particledaps.settings.tasks import OPERATORS, check_options

PRECISIONS = ("float32", "bfloat16", "float16")
DATA_KINDS = ("demo", "folder", "npz")
MODEL_KINDS = ("embedded", *FOLDER_KINDS, "custom")
TASK_KINDS = (*OPERATORS, "custom")
ON_ERROR = ("continue", "stop")
SPLITS = ("test", "validation", "train")
PRIOR_TERMS = ("gaussian", "exact")
IN_PIXELS = ("cg", "admm")
SPACES, COVARIANCES = ("latent", "pixel"), ("sigma", "measured")
TIMESTEP_MAPS = ("native", "vp")


def check_particles(num_samples: int, particle_ids: list[int] | None, checks: Checks) -> None:
    """Report what no batch of particles could be."""
    checks.number("num_samples", num_samples, 1, 4096)
    ids = particle_ids
    if ids is not None:
        fits = bool(ids) and len(set(ids)) == len(ids) and all(0 <= i < num_samples for i in ids)
        checks.require(fits, f"particle_ids={ids}: must be distinct ids from 0 to num_samples - 1")


def check_machine(device: str, gpu: int, precision: str, decode_batch: int | None, checks: Checks) -> None:
    """Report what cannot be computed on or with."""
    checks.choice("device", device, DEVICES)
    checks.number("gpu", gpu, 0)
    checks.choice("precision", precision, PRECISIONS)
    if decode_batch is not None:
        checks.number("decode_batch", decode_batch, 1)


def check_results(name: str, save_dir: str, checks: Checks) -> None:
    """Report what no folder of results could be called."""
    checks.folder_name("name", name)
    checks.require(bool(save_dir.strip()), "save_dir='': name the folder of all results, such as results")


def check_data(data: DataSettings, on_error: str, checks: Checks) -> None:
    """Report what no images could be read from."""
    checks.choice("on_error", on_error, ON_ERROR)
    checks.choice("data.kind", data.kind, DATA_KINDS)
    checks.choice("data.split", data.split, SPLITS)
    images = None if data.measurement is not None else data.kind  # given measurements need no images
    checks.require(images != "folder" or bool(data.dir), "data.dir is not set: name a folder of images")
    checks.require(images != "npz" or bool(data.path), "data.path is not set: name an .npz file of images")
    checks.number("data.start_id", data.start_id, 0)
    if data.end_id is not None:
        checks.require(
            data.end_id > data.start_id,
            f"data.end_id={data.end_id}: must be greater than data.start_id={data.start_id}",
        )
    if data.bit_depth is not None:
        checks.number("data.bit_depth", data.bit_depth, 1, 32)
        checks.require(images == "folder", f"data.bit_depth={data.bit_depth}: only for data=folder")


def check_task(task: TaskSettings, data: DataSettings, checks: Checks) -> None:
    """Report what no operator could be made from."""
    _check_convention(data, task, checks)
    checks.choice("task.kind", task.kind, TASK_KINDS)
    checks.require(task.kind != "custom" or bool(task.target), "task.target is not set: package.module:factory")
    checks.number("task.oversample", task.oversample, 0, 64, open_low=True)
    _check_noise(data, task, checks)
    if task.kind in OPERATORS:
        check_options(task.kind, task.options, operator_arguments(task), checks)


def _check_noise(data: DataSettings, task: TaskSettings, checks: Checks) -> None:
    sigma = task.noise_sigma
    if sigma == AUTO:
        checks.require(
            data.measurement is not None,
            "task.noise_sigma=auto: is read off a given measurement; to simulate one say task.noise_sigma=NUMBER",
        )
    elif isinstance(sigma, str):
        checks.require(False, f"task.noise_sigma={sigma}: must be a number greater than 0, or auto")
    else:
        checks.number("task.noise_sigma", sigma, 0, open_low=True)
    checks.require(
        task.kind != "custom" or sigma == TaskSettings().noise_sigma,
        f"task.noise_sigma={sigma}: a custom operator has its own; if its factory takes it, "
        f"+task.options.noise_sigma={sigma}",
    )


def _check_convention(data: DataSettings, task: TaskSettings, checks: Checks) -> None:
    """``task.measurement`` and ``task.origin`` describe a file of magnitudes; elsewhere they would be ignored."""
    defaults = TaskSettings()
    for name, allowed in (("measurement", FORMS), ("origin", ORIGINS)):
        value = getattr(task, name)
        checks.choice(f"task.{name}", value, allowed)
        said = value != getattr(defaults, name)
        checks.require(
            not said or task.kind == "phase_retrieval", f"task.{name}={value}: only for task=phase_retrieval"
        )
        checks.require(
            not said or data.measurement is not None,
            f"task.{name}={value}: describes the file data.measurement, and there is none",
        )


def check_model(model: ModelSettings, checks: Checks) -> None:
    """Report what no prior could be loaded with."""
    checks.choice("model.kind", model.kind, MODEL_KINDS)
    checks.require(model.kind != "custom" or bool(model.target), "model.target is not set: package.module:factory")
    checks.require(model.kind != "embedded" or bool(model.path), "model.path is not set: folder of a trained prior")
    from_folder = model.kind in FOLDER_KINDS
    if model.family is not None:  # else the missing folder is told where its family is looked for
        checks.require(not from_folder or bool(model.path), "model.path is not set: folder of a converted checkpoint")
    for name in ("class_id", "negative_class_id"):
        if getattr(model, name) is not None:
            checks.number(f"model.{name}", getattr(model, name), 0)
    if model.image_size is not None:
        checks.number("model.image_size", model.image_size, 8, 4096)
    if model.latent_scale is not None:
        checks.number("model.latent_scale", model.latent_scale, 0, open_low=True)
    checks.number("model.guidance_scale", model.guidance_scale, 0, 100)
    checks.number("model.guidance_rescale", model.guidance_rescale, 0, 1)
    fault = interval_fault(model.guidance_interval)
    checks.require(fault is None, fault or "")
    defaults = ModelSettings()
    for name in ("latent_scale", "image_size"):
        checks.require(
            from_folder or getattr(model, name) == getattr(defaults, name),
            f"model.{name}={getattr(model, name)}: only for model.kind {', '.join(FOLDER_KINDS)}; a custom prior takes "
            "model.options",
        )


def check_loop(annealing: AnnealingSettings, ode: OdeSettings, compat: CompatSettings, checks: Checks) -> None:
    """Report what no annealing loop could run with."""
    for prefix, part in (("sampler.annealing", annealing), ("sampler.ode", ode)):
        checks.choice(f"{prefix}.schedule", part.schedule, list(PATHS))
        checks.number(f"{prefix}.num_steps", part.num_steps, 1, 100_000)
        checks.number(f"{prefix}.sigma_min", part.sigma_min, 0, open_low=True)
    checks.number("sampler.annealing.sigma_max", annealing.sigma_max, 0, open_low=True)
    high, low = annealing.sigma_max, annealing.sigma_min
    inner = ode.sigma_min
    if high is not None and low is not None and inner is not None:
        checks.require(high > low, f"sampler.annealing.sigma_max={high}: must exceed sigma_min={low}")
        checks.require(inner < low, f"sampler.ode.sigma_min={inner}: must be below sampler.annealing.sigma_min={low}")
    checks.choice("sampler.ode.solver", ode.solver, SOLVERS)
    checks.choice("compat.timestep_map", compat.timestep_map, TIMESTEP_MAPS)
    checks.choice("compat.inner_end", compat.inner_end, ENDS)
    if compat.gradient_clamp is not None:
        checks.number("compat.gradient_clamp", compat.gradient_clamp, 0, open_low=True)


def check_chain(chain: ChainConfig, compat: CompatSettings, checks: Checks) -> None:
    """Report what no MCMC chain could run with."""
    checks.choice("sampler.mcmc.kernel", chain.kernel, (*KERNELS, *IN_PIXELS))
    checks.require(
        chain.kernel not in IN_PIXELS or chain.space == "pixel",
        f"sampler.mcmc.kernel={chain.kernel}: solves for the image itself; add sampler.mcmc.space=pixel",
    )
    checks.choice("sampler.mcmc.prior", chain.prior, PRIOR_TERMS)
    checks.number("sampler.mcmc.num_steps", chain.num_steps, 1, 1_000_000)
    checks.number("sampler.mcmc.step_size", chain.step_size, 0, open_low=True)
    checks.number("sampler.mcmc.step_size_min_ratio", chain.step_size_min_ratio, 0, 1, open_low=True)
    checks.number("sampler.mcmc.momentum", chain.momentum, 0, 0.9999)
    checks.number("sampler.mcmc.tau", chain.tau, 0, open_low=True)
    checks.number("sampler.mcmc.prior_sigma", chain.prior_sigma, 0, open_low=True)
    if chain.curvature_limit is not None:
        checks.number("sampler.mcmc.curvature_limit", chain.curvature_limit, 0, open_low=True)
    checks.require(
        not (chain.kernel == "mh" and chain.prior == "exact"),
        "sampler.mcmc.kernel=mh: needs a potential, which sampler.mcmc.prior=exact does not have; use prior=gaussian",
    )
    checks.choice("sampler.mcmc.space", chain.space, SPACES)
    checks.choice("sampler.mcmc.covariance", chain.covariance, COVARIANCES)
    for name, plain in (("space", "latent"), ("covariance", "sigma")):
        checks.require(
            chain.prior != "exact" or getattr(chain, name) == plain,
            f"sampler.mcmc.prior=exact: takes the prior's score in latents, beside sampler.mcmc.{name}={plain} only",
        )
    checks.require(
        compat.gradient_clamp is None or chain.space == "latent",
        f"compat.gradient_clamp={compat.gradient_clamp}: clamps gradients in latents; a chain in pixels has none "
        "(compat.gradient_clamp=null)",
    )
