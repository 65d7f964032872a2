"""Checks of the configuration: each runs before a model is loaded, and everything they find is reported at once."""

from __future__ import annotations

from diffusion.mcmc import KERNELS
from diffusion.paths import ENDS, PATHS
from diffusion.pfode import SOLVERS
from evaluation.selection import RULES
from operators.magnitudes import FORMS, ORIGINS
from plan import RunSettings, check_hooks, check_own_hooks, follow_family, resolve_chain
from runs.checks import Checks, SettingsError
from runs.device import DEVICES
from runs.operators import OPERATORS, check_options
from runs.settings import FOLDER_KINDS, DataSettings, ModelSettings, TaskSettings, operator_arguments

PRECISIONS = ("float32", "bfloat16", "float16")
DATA_KINDS = ("demo", "folder", "npz")
MODEL_KINDS = ("embedded", *FOLDER_KINDS, "custom")
TASK_KINDS = (*OPERATORS, "custom")
ON_ERROR = ("continue", "stop")
SPLITS = ("test", "validation", "train")
PRIOR_TERMS = ("gaussian", "exact")
TIMESTEP_MAPS = ("native", "vp")


def validate(settings: RunSettings) -> None:
    """Check every value.

    Raises:
        SettingsError: with one line a problem: the key, the value, what is allowed.
    """
    checks = Checks()
    _check_top(settings, checks)
    check_hooks(settings, settings.num_samples, checks)
    check_own_hooks(settings.hooks, checks)
    _check_parts(settings, checks)
    check_model(settings.model, checks)
    try:
        _check_sampler(follow_family(settings), checks)
    except SettingsError as error:
        checks.problems.append(str(error))
    checks.finish()


def _check_top(settings: RunSettings, checks: Checks) -> None:
    checks.folder_name("name", settings.name)
    checks.require(bool(settings.save_dir.strip()), "save_dir='': name the folder of all results, such as results")
    checks.number("num_samples", settings.num_samples, 1, 4096)
    ids = settings.particle_ids
    if ids is not None:
        fits = bool(ids) and len(set(ids)) == len(ids) and all(0 <= i < settings.num_samples for i in ids)
        checks.require(fits, f"particle_ids={ids}: must be distinct ids from 0 to num_samples - 1")
    checks.choice("device", settings.device, DEVICES)
    checks.choice("selection_rule", settings.selection_rule, RULES)
    checks.choice("on_error", settings.on_error, ON_ERROR)
    checks.choice("precision", settings.precision, PRECISIONS)
    if settings.decode_batch is not None:
        checks.number("decode_batch", settings.decode_batch, 1)
    checks.number("gpu", settings.gpu, 0)
    checks.number("seed", settings.seed, 0)


def _check_parts(settings: RunSettings, checks: Checks) -> None:
    data, model, task = settings.data, settings.model, settings.task
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
    _check_convention(data, task, checks)
    checks.choice("model.kind", model.kind, MODEL_KINDS)
    checks.require(model.kind != "custom" or bool(model.target), "model.target is not set: package.module:factory")
    checks.require(model.kind != "embedded" or bool(model.path), "model.path is not set: folder of a trained prior")
    checks.choice("task.kind", task.kind, TASK_KINDS)
    checks.require(task.kind != "custom" or bool(task.target), "task.target is not set: package.module:factory")
    checks.number("task.oversample", task.oversample, 0, 64, open_low=True)
    checks.number("task.noise_sigma", task.noise_sigma, 0, open_low=True)
    checks.require(
        task.kind != "custom" or task.noise_sigma == TaskSettings().noise_sigma,
        f"task.noise_sigma={task.noise_sigma:g}: a custom operator has its own; if its factory takes it, "
        f"+task.options.noise_sigma={task.noise_sigma:g}",
    )
    if task.kind in OPERATORS:
        check_options(task.kind, task.options, operator_arguments(task), checks)


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
    from_folder = model.kind in FOLDER_KINDS
    if model.family is not None:  # else the missing folder is told where its family is looked for
        checks.require(not from_folder or bool(model.path), "model.path is not set: folder of a converted checkpoint")
    if model.class_id is not None:
        checks.number("model.class_id", model.class_id, 0)
    if model.image_size is not None:
        checks.number("model.image_size", model.image_size, 8, 4096)
    if model.latent_scale is not None:
        checks.number("model.latent_scale", model.latent_scale, 0, open_low=True)
    checks.number("model.guidance_scale", model.guidance_scale, 0, 100)
    defaults = ModelSettings()
    for name in ("class_id", "prompt", "guidance_scale", "latent_scale", "image_size"):
        checks.require(
            from_folder or getattr(model, name) == getattr(defaults, name),
            f"model.{name}={getattr(model, name)}: only for model.kind {', '.join(FOLDER_KINDS)}; a custom prior takes "
            "model.options",
        )


def _check_sampler(settings: RunSettings, checks: Checks) -> None:
    annealing, ode, compat = settings.sampler.annealing, settings.sampler.ode, settings.compat
    for prefix, part in (("sampler.annealing", annealing), ("sampler.ode", ode)):
        checks.choice(f"{prefix}.schedule", part.schedule, list(PATHS))
        checks.number(f"{prefix}.num_steps", part.num_steps, 1, 100_000)
        checks.number(f"{prefix}.sigma_min", part.sigma_min, 0, open_low=True)
    last_t = 1000 / max(annealing.num_steps, 1)
    checks.require(
        settings.pruning_step < 0 or last_t <= settings.pruning_step,
        f"pruning_step={settings.pruning_step}: no level is that late; the last of {annealing.num_steps} levels has "
        f"t = {last_t:g}",
    )
    checks.require(
        settings.optimization_step < 0 or settings.optimization_when == "end" or last_t <= settings.optimization_step,
        f"optimization_step={settings.optimization_step}: no level is that late (the last has t = {last_t:g}); "
        "use optimization_when=end",
    )
    checks.number("sampler.annealing.sigma_max", annealing.sigma_max, 0, open_low=True)
    checks.require(
        annealing.sigma_max > annealing.sigma_min,
        f"sampler.annealing.sigma_max={annealing.sigma_max}: must exceed sigma_min={annealing.sigma_min}",
    )
    checks.require(
        ode.sigma_min < annealing.sigma_min,
        f"sampler.ode.sigma_min={ode.sigma_min}: must be below sampler.annealing.sigma_min={annealing.sigma_min}",
    )
    checks.choice("sampler.ode.solver", ode.solver, SOLVERS)
    checks.choice("compat.timestep_map", compat.timestep_map, TIMESTEP_MAPS)
    checks.choice("compat.inner_end", compat.inner_end, ENDS)
    if compat.gradient_clamp is not None:
        checks.number("compat.gradient_clamp", compat.gradient_clamp, 0, open_low=True)
    try:
        chain = resolve_chain(settings)
    except SettingsError as error:
        checks.problems.append(str(error))
        return
    checks.choice("sampler.mcmc.kernel", chain.kernel, KERNELS)
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
