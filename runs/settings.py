"""The typed configuration of ``posterior_sample.py`` and its checks.

The dataclasses are the single source of names, types and defaults; the files in ``configs/`` only override them.
Every check runs before a model is loaded, and reports everything it finds at once.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

import torch

from diffusion.mcmc import KERNELS
from diffusion.paths import ENDS, PATHS
from diffusion.pfode import SOLVERS
from evaluation.selection import RULES
from runs.checks import Checks, SettingsError
from runs.family import follow_family
from runs.hook_settings import HookKeys, check_hooks
from runs.operators import OPERATORS, check_options

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("float32", "bfloat16", "float16")
DATA_KINDS = ("demo", "folder", "npz")
FOLDER_KINDS = ("ldm", "adm", "diffusers")
MODEL_KINDS = ("embedded", *FOLDER_KINDS, "custom")
TASK_KINDS = (*OPERATORS, "custom")
SPLITS = ("test", "validation", "train")
PRIOR_TERMS = ("gaussian", "exact")
TIMESTEP_MAPS = ("native", "vp")


@dataclass
class DataSettings:
    """Images to reconstruct.

    Attributes:
        kind: ``demo`` (a photograph and synthetic cats), ``folder`` or ``npz``.
        dir: folder of images, for ``folder``.
        path: the file, for ``npz``.
        split: ``test``, ``validation`` or ``train`` of an ``npz``.
        start_id: first image id.
        end_id: one past the last image id; null means all.
        measurement: ``.npz`` with ``y`` ``(N, ...)`` (and ``image_ids``) to reconstruct instead of simulating.
    """

    kind: str = "demo"
    dir: str | None = None
    path: str | None = None
    split: str = "test"
    start_id: int = 0
    end_id: int | None = None
    measurement: str | None = None


@dataclass
class ModelSettings:
    """The prior.

    Attributes:
        kind: ``embedded`` (a folder written by ``train_prior.py``), ``ldm`` or ``adm`` (a latent or a pixel network
            converted by ``tools/convert_checkpoint.py``), ``diffusers`` (any diffusers folder) or ``custom``.
        path: folder of the prior; relative paths start at the checkout. For ``diffusers`` also a hub id in the cache.
        target: for ``custom``: ``package.module:factory``, called with ``device``, ``compat`` and ``options``.
        options: handed to the factory.
        family: which entries of ``sampler.families`` and ``task.mcmc`` fit; null: seen from a ``diffusers`` folder.
        class_id: class of a class-conditional network; null: its null class (1000 for the ImageNet LDM).
        prompt: text for Stable Diffusion and its kin.
        guidance_scale: weight of classifier-free guidance; 1: off.
        latent_scale: factor of the latents; null: what the folder says (1 for VQ-f4).
        image_size: show a latent prior at this side (bilinear); null: its own.
    """

    kind: str = "embedded"
    path: str | None = None
    target: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    family: str | None = "cats64"
    class_id: int | None = None
    prompt: str = ""
    guidance_scale: float = 1.0
    latent_scale: float | None = None
    image_size: int | None = None


@dataclass
class ChainConfig:
    """MCMC values; see :class:`diffusion.mcmc.ChainSettings` and :class:`sampler.SamplerSettings`.

    A null takes the value of ``task.mcmc.<model.family>``.
    """

    kernel: str | None = None
    num_steps: int | None = None
    step_size: float | None = None
    step_size_min_ratio: float | None = None
    momentum: float | None = None
    tau: float | None = None
    prior: str = "gaussian"
    prior_sigma: float = 0.01
    curvature_limit: float | None = None


@dataclass
class TaskSettings:
    """The measurement.

    Attributes:
        kind: ``phase_retrieval``, ``down_sampling``, ``inpainting``, ``inpainting_rand``, ``gaussian_blur``,
            ``motion_blur``, ``nonlinear_blur``, ``hdr`` or ``custom``.
        target: for ``custom``: ``package.module:factory``, called with ``options``, returns an Operator.
        options: handed to the factory; for the other kinds the parameters of the operator (:mod:`runs.operators`).
        oversample: padding of phase retrieval in eighths of the side.
        noise_sigma: standard deviation of the measurement noise.
        mcmc: MCMC values per prior family.
    """

    kind: str = "phase_retrieval"
    target: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    oversample: float = 2.0
    noise_sigma: float = 0.05
    mcmc: dict[str, ChainConfig] = field(default_factory=dict)


@dataclass
class AnnealingSettings:
    """The outer sigma path: ``num_steps`` levels from ``sigma_max``, the last node is 0.

    A null takes the value of ``sampler.families.<model.family>``.
    """

    schedule: str | None = "edm"
    num_steps: int | None = 50
    sigma_max: float | None = 10.0
    sigma_min: float | None = 0.1


@dataclass
class OdeSettings:
    """The inner ODE: ``num_steps`` intervals from the level's sigma to 0 (``sigma_min`` with ``compat.inner_end``).

    A null takes the value of ``sampler.families.<model.family>``.
    """

    schedule: str | None = "edm"
    num_steps: int | None = 2
    sigma_min: float | None = 0.001
    solver: str | None = "euler"


@dataclass
class FamilySampler:
    """The annealing loop that fits one family of priors; its MCMC values go before those of the task."""

    annealing: AnnealingSettings = field(default_factory=AnnealingSettings)
    ode: OdeSettings = field(default_factory=OdeSettings)
    mcmc: ChainConfig = field(default_factory=ChainConfig)


@dataclass
class SamplerConfig(FamilySampler):
    """The annealing loop.

    Attributes:
        families: values per family of priors, for what is null here; empty once they are filled in.
    """

    families: dict[str, FamilySampler] = field(default_factory=dict)


@dataclass
class CompatSettings:
    """Switches between the correct mathematics (defaults) and the official DAPS code (``compat=daps``).

    Attributes:
        timestep_map: ``native`` (the checkpoint's own betas) or ``vp`` (DAPS: the pixel schedule for every network).
        ema: use averaged weights where a checkpoint has them.
        likelihood_half: data term ``L / (2 tau^2)``; false: ``L / tau^2``.
        gradient_clamp: elementwise clamp of the latent gradient of the loss; null: none.
        quantize_in_decode: quantise latents of VQ priors inside decode.
        inner_end: the inner ODE ends at ``zero`` or ``sigma_min``.
        ratio_counts_end: step-size schedule over ``K + 1`` instead of ``K - 1``.
    """

    timestep_map: str = "native"
    ema: bool = True
    likelihood_half: bool = True
    gradient_clamp: float | None = None
    quantize_in_decode: bool = False
    inner_end: str = "zero"
    ratio_counts_end: bool = False


@dataclass
class RunSettings(HookKeys):
    """Everything that ``posterior_sample.py`` can be told.

    Attributes:
        name: name of the run; its results are ``<save_dir>/<name>/``.
        save_dir: folder of all results.
        seed: of every random stream.
        num_samples: particles a measurement.
        particle_ids: run only these particles; null means all. Each is exactly as in the full batch as long as nothing
            couples particles (repulsion, pruning, resampling).
        use_tpu: run on a TPU (needs torch_xla).
        device: ``auto``, ``cpu`` or ``cuda``.
        gpu: index of the CUDA device.
        precision: ``float32``, or ``bfloat16`` inside the networks.
        selection_rule: how the answer is chosen without the truth, see :mod:`evaluation.selection`; ``posterior`` takes
            tau from ``optimization_tau``.
        decode_batch: decode and differentiate at most this many particles at once, to save memory; null: all.
        save_trajectory: write the trajectory figures.
    """

    name: str = "demo"
    save_dir: str = "results"
    seed: int = 42
    num_samples: int = 4
    particle_ids: list[int] | None = None
    use_tpu: bool = False
    device: str = "auto"
    gpu: int = 0
    precision: str = "float32"
    selection_rule: str = "loss"
    decode_batch: int | None = None
    save_trajectory: bool = True
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    task: TaskSettings = field(default_factory=TaskSettings)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    compat: CompatSettings = field(default_factory=CompatSettings)


SILENT_AT_DEFAULT = {  # keys without effect at these values: the hash is the same with and without them
    ("model", "class_id"): None,
    ("model", "prompt"): "",
    ("model", "guidance_scale"): 1.0,
    ("model", "latent_scale"): None,
    ("model", "image_size"): None,
    ("sampler", "families"): {},
}


def operator_arguments(task: TaskSettings) -> dict[str, float]:
    """Arguments of the operator that have keys of their own beside ``task.options``."""
    padding = {"oversample": task.oversample} if task.kind == "phase_retrieval" else {}
    return {**padding, "noise_sigma": task.noise_sigma}


NOT_IN_HASH = ("save_dir", "name", "device", "gpu", "use_tpu", "save_trajectory")


def config_sha256(config: dict[str, Any]) -> str:
    """Hash of what determines the numbers: everything but where, on what and for which image ids."""
    kept = {k: v for k, v in config.items() if k not in NOT_IN_HASH}
    kept["data"] = {k: v for k, v in config["data"].items() if k not in ("start_id", "end_id")}
    for (part, key), default in SILENT_AT_DEFAULT.items():
        if part in kept and kept[part].get(key, default) == default:
            kept[part] = {k: v for k, v in kept[part].items() if k != key}
    if config.get("model", {}).get("family") != "sd" and "sd" in config.get("task", {}).get("mcmc", {}):
        others = {k: v for k, v in config["task"]["mcmc"].items() if k != "sd"}
        kept["task"] = config["task"] | {"mcmc": others}  # without effect for other families too
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def resolve_chain(settings: RunSettings) -> ChainConfig:
    """The sampler's MCMC values, with nulls taken from ``task.mcmc.<family>``."""
    settings = follow_family(settings)
    chain, family = settings.sampler.mcmc, settings.model.family
    fallback = settings.task.mcmc.get(family, ChainConfig())
    names = ("kernel", "num_steps", "step_size", "step_size_min_ratio", "momentum", "tau")
    values = {n: getattr(fallback, n) if getattr(chain, n) is None else getattr(chain, n) for n in names}
    missing = [n for n, v in values.items() if v is None]
    if missing:
        raise SettingsError(
            f"sampler.mcmc.{missing[0]} is not set and task.mcmc has no value for model.family={family} "
            f"(it knows {', '.join(settings.task.mcmc) or 'none'}); choose e.g. sampler=latent_daps_small"
        )
    return dataclasses.replace(chain, **values)


def validate(settings: RunSettings) -> None:
    """Check every value.

    Raises:
        SettingsError: with one line a problem: the key, the value, what is allowed.
    """
    checks = Checks()
    _check_top(settings, checks)
    check_hooks(settings, settings.num_samples, checks)
    _check_parts(settings, checks)
    _check_model(settings.model, checks)
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


def _check_model(model: ModelSettings, checks: Checks) -> None:
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


def choose_device(settings: RunSettings) -> torch.device:
    """The device that ``device``, ``gpu`` and ``use_tpu`` ask for.

    Raises:
        SettingsError: that device is not there.
    """
    if settings.use_tpu:
        try:
            import torch_xla
        except ImportError as error:
            raise SettingsError(
                "use_tpu=true: needs the package torch_xla on a TPU machine (pip install torch_xla); "
                "use device=cpu or device=cuda here"
            ) from error
        return torch_xla.device()
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SettingsError("device=cuda: torch sees no CUDA device; use device=cpu or device=auto")
    if settings.gpu >= torch.cuda.device_count():
        raise SettingsError(f"gpu={settings.gpu}: this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}")
    return torch.device("cuda", settings.gpu)
