"""Parts of the typed configuration of a run.

With :class:`run_settings.RunSettings` the dataclasses are the single source of names, types and defaults; the files in
``configs/`` only override them, and :mod:`particledaps.settings.validation` checks them. A new key needs a neutral
value (:mod:`particledaps.settings.keys`), so that stored runs go on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from particledaps.settings.keys import facts

FOLDER_KINDS = ("ldm", "adm", "diffusers")


AUTO = "auto"
"""``task.noise_sigma`` of measurements that tell it themselves."""


@dataclass
class DataSettings:
    """Images to reconstruct.

    Attributes:
        kind: ``demo`` (a photograph and synthetic cats; above 128 px photographs alone), ``folder`` or ``npz``.
        dir: folder of images, for ``folder``.
        path: the file, for ``npz``.
        split: ``test``, ``validation`` or ``train`` of an ``npz``.
        start_id: first image id.
        end_id: one past the last image id; null means all.
        measurement: ``.npz`` with ``y`` ``(N, ...)`` (and ``image_ids``) to reconstruct instead of simulating.
        bit_depth: of pictures with more than 8 bits, where their files do not tell: 12 for 12 bits stored in 16.
    """

    kind: str = "demo"
    dir: str | None = None
    path: str | None = None
    split: str = "test"
    start_id: int = field(default=0, metadata=facts(identity=False))
    end_id: int | None = field(default=None, metadata=facts(identity=False))
    measurement: str | None = None
    bit_depth: int | None = field(default=None, metadata=facts(neutral=None))


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
        guidance_scale: weight of classifier-free guidance; 1: off (the condition alone), 0: the negative one alone.
        negative_class_id: class to guide away from; null: the null class.
        negative_prompt: text to guide away from; null: the empty one.
        guidance_rescale: share, 0 to 1, of the guided noise estimate that is scaled back to its size under the
            condition alone; 0.7 mends strong guidance.
        guidance_interval: ``[low, high]`` in sigma: guide where low <= sigma < high only; null: everywhere.
        latent_scale: factor of the latents; null: what the folder says (1 for VQ-f4).
        image_size: show a latent prior at this side (bilinear); null: its own.
    """

    kind: str = "embedded"
    path: str | None = None
    target: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    family: str | None = "cats64"
    class_id: int | None = field(default=None, metadata=facts(neutral=None))
    prompt: str = field(default="", metadata=facts(neutral=""))
    guidance_scale: float = field(default=1.0, metadata=facts(neutral=1.0))
    negative_class_id: int | None = field(default=None, metadata=facts(neutral=None))
    negative_prompt: str | None = field(default=None, metadata=facts(neutral=None))
    guidance_rescale: float = field(default=0.0, metadata=facts(neutral=0.0))
    guidance_interval: list[float] | None = field(default=None, metadata=facts(neutral=None))
    latent_scale: float | None = field(default=None, metadata=facts(neutral=None))
    image_size: int | None = field(default=None, metadata=facts(neutral=None))


@dataclass
class ChainConfig:
    """The MCMC chain of each level; a null takes the value of ``task.mcmc.<model.family>``.

    Attributes:
        kernel: ``langevin`` (unadjusted), ``hmc`` (the under-damped form of DAPS), ``mh`` (random walk), or, for linear
            tasks in pixels, ``cg``: one exact draw a level by conjugate gradients; for phase retrieval in pixels,
            ``admm``: the level's minimum by splitting the amplitudes from the support, not a draw.
        num_steps: steps a level, one decoder call with gradient each (``mh``: two without; in pixels none); of ``cg``
            at most, of ``admm`` its steps.
        step_size: of the first level.
        step_size_min_ratio: the step size falls linearly over the levels to this fraction.
        momentum: of ``hmc``, in [0, 1); 0 is Langevin.
        tau: standard deviation of the likelihood; less than the noise is tempering.
        prior: ``gaussian`` for ``N(z0_hat, sigma^2)`` (DAPS; biased) or ``exact`` for ``p(z0) N(z_t; z0, sigma^2)``.
        prior_sigma: sigma at which ``exact`` evaluates the prior's score.
        curvature_limit: lower each particle's step size to this multiple of 1 / (its largest curvature, estimated);
            null: off.
        space: where the chain runs: ``latent``, or ``pixel``: on the decoded clean estimate, a step of which costs no
            decoder call; the encoder brings it back.
        covariance: of the clean estimate: ``sigma`` for ``sigma^2`` of every element (DAPS), or ``measured``, per
            frequency band, around the posterior mean D(z; sigma), which then takes the place of the ODE.
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
    space: str = field(default="latent", metadata=facts(neutral="latent"))
    covariance: str = field(default="sigma", metadata=facts(neutral="sigma"))


@dataclass
class TaskSettings:
    """The measurement.

    Attributes:
        kind: ``phase_retrieval``, ``down_sampling``, ``inpainting``, ``inpainting_rand``, ``gaussian_blur``,
            ``motion_blur``, ``nonlinear_blur``, ``hdr`` or ``custom``.
        target: for ``custom``: ``package.module:factory``, called with ``options``, returns an Operator.
        options: handed to the factory; for the other kinds the parameters of the operator
            (:mod:`particledaps.settings.tasks`).
        oversample: padding of phase retrieval in eighths of the side.
        noise_sigma: standard deviation of the measurement noise; of phase retrieval that of the amplitudes. ``auto``:
            as each given measurement shows it (conjugate pairs; pixels that a mask leaves out), else the effective
            one, estimated beside the image: what the prior's decoder cannot say counts as noise.
        measurement: what a given phase-retrieval file holds: ``amplitude``, or ``intensity`` (squared amplitudes).
        origin: where its frequency 0 is: ``centre``, or ``corner`` (the order of ``fft2``).
        mcmc: MCMC values per prior family.
    """

    kind: str = "phase_retrieval"
    target: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    oversample: float = 2.0
    noise_sigma: int | float | str = 0.05
    measurement: str = field(default="amplitude", metadata=facts(neutral="amplitude"))
    origin: str = field(default="centre", metadata=facts(neutral="centre"))
    mcmc: dict[str, ChainConfig] = field(default_factory=dict, metadata=facts(always=("pixel", "ldm", "cats64")))


@dataclass
class AnnealingSettings:
    """The annealing path; a null takes the value of ``sampler.families.<model.family>``.

    Attributes:
        schedule: spacing of the levels: ``edm``, ``vp``, ``vp_scaled``, ``ve`` or ``cosine``.
        num_steps: levels K.
        sigma_max: noise level of the first one.
        sigma_min: of the last one; after it the noise is 0.
    """

    schedule: str | None = "edm"
    num_steps: int | None = 50
    sigma_max: float | None = 10.0
    sigma_min: float | None = 0.1


@dataclass
class OdeSettings:
    """The ODE inside of a level; a null takes the value of ``sampler.families.<model.family>``.

    Attributes:
        schedule: spacing of its nodes, as above.
        num_steps: intervals from the level's sigma to 0 (to ``sigma_min`` with ``compat.inner_end=sigma_min``).
        sigma_min: the last node before 0.
        solver: ``euler``, or ``heun`` (two denoiser calls a step).
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
        annealing: the annealing path.
        ode: the ODE inside of a level.
        mcmc: the MCMC chain of each level.
        families: values per family of priors, for what is null here; empty once they are filled in.
    """

    families: dict[str, FamilySampler] = field(default_factory=dict, metadata=facts(neutral={}))


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


def operator_arguments(task: TaskSettings) -> dict[str, Any]:
    """Arguments of the operator that have keys of their own beside ``task.options``."""
    padding = {"oversample": task.oversample} if task.kind == "phase_retrieval" else {}
    noise = {} if isinstance(task.noise_sigma, str) else {"noise_sigma": task.noise_sigma}  # auto: the default
    return {**padding, **noise}
