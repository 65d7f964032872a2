"""Settings of ``train_prior.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from particledaps.checks import Checks
from particledaps.diffusion.targets import TARGETS
from particledaps.priors.transforms import TRANSFORMS
from particledaps.settings.device import DEVICES
from particledaps.training.autoencoder import AutoencoderSettings
from particledaps.training.denoiser import DenoiserSettings
from particledaps.training.loop import LoopSettings

STAGES = ("autoencoder", "denoiser", "export")
ENCODINGS = ("autoencoder", *TRANSFORMS)
MOST_LEVELS = 8
WIDEST = 8192
LARGEST_SIDE = 4096
MOST_STEPS = 10**9
LARGEST_SEED = 2**32
"""A step's generator is seeded by a million times it, in 64 bits."""
LARGEST, LARGEST_RATE = 1e6, 1e30


@dataclass
class TrainingSettings:
    """Everything that ``train_prior.py`` can be told.

    Attributes:
        name: name of the prior; the trainings live in ``<save_dir>/<name>/<stage>``.
        save_dir: folder of the trainings.
        images: folder of images, or an ``.npz`` file with ``train_images``.
        large_images: for an ``.npz``: the same images at twice the resolution as JPEG bytes, for zooms; or null.
        resolution: side of the images in pixels.
        zoom: probability that a training sample is a random crop of the large image.
        min_crop: smallest crop side as a fraction of the full frame.
        close_up: probability that a training sample is a crop about the middle of the large image, at most half way
            between ``min_crop`` and the full frame.
        mirror: are half of the training samples mirrored left to right? Off where left and right differ.
        channels: of the pictures of a folder, 1 or 3; null: 1 if all of them are grey. An .npz has those of its array.
        encoding: what the denoiser sees of an image: the latents of a trained ``autoencoder``, its ``pixels``, its
            ``haar`` details and averages (two parts with noise of their own), or ``two_scale`` (it and its copy at
            half the side, also two parts).
        class_conditional: train with the classes of the images: ``train_labels`` of an .npz, or the folders of a
            folder.
        stages: stages to run, in this order: autoencoder (only with that encoding), denoiser, export.
        export_dir: where ``export`` writes the prior.
        source: one line for the card: which images, by whom, under which terms.
        licence: licence of the weights, for the card.
        seed: seed of weights, batches and noise.
        device: ``auto``, ``cpu`` or ``cuda``.
        autoencoder: stage one.
        denoiser: stage two.
    """

    name: str = "prior"
    save_dir: str = "trainings"
    images: str = "???"
    large_images: str | None = None
    resolution: int = 64
    zoom: float = 0.5
    min_crop: float = 0.5
    close_up: float = 0.0
    mirror: bool = True
    channels: int | None = None
    encoding: str = "autoencoder"
    class_conditional: bool = False
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    export_dir: str = "assets/prior"
    source: str = "not stated"
    licence: str = "not stated"
    seed: int = 42
    device: str = "auto"
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)


def validate(settings: TrainingSettings) -> None:
    """Check what would otherwise fail in the middle of a training.

    Raises:
        SettingsError: with one line a problem: the key, the value, what is allowed.
    """
    checks = Checks()
    checks.folder_name("name", settings.name)
    _check_paths(checks, settings)
    checks.require(bool(settings.stages), f"stages=[]: name at least one of {', '.join(STAGES)}")
    for stage in settings.stages:
        checks.choice("stages", stage, STAGES)
    checks.choice("device", settings.device, DEVICES)
    checks.choice("encoding", settings.encoding, ENCODINGS)
    checks.require(settings.channels in (None, 1, 3), f"channels={settings.channels}: must be 1, 3 or null")
    _check_crops(checks, settings)
    _limited(checks, "seed", settings.seed, 0, LARGEST_SEED)
    _check_autoencoder(checks, settings.autoencoder)
    _check_denoiser(checks, settings.denoiser)
    _check_resolution(checks, settings)
    for stage in ("autoencoder", "denoiser"):
        _check_loop(checks, f"{stage}.loop", getattr(settings, stage).loop)
    checks.finish()


def _check_paths(checks: Checks, settings: TrainingSettings) -> None:
    for key in ("save_dir", "images", "export_dir"):
        value = getattr(settings, key)
        checks.require(bool(value.strip()) and "\0" not in value, f"{key}='{value}': must name a folder")
        if key != "images":
            in_the_way = [path for path in (Path(value), *Path(value).parents) if path.exists() and not path.is_dir()]
            checks.require(not in_the_way, f"{key}={value}: {in_the_way[0] if in_the_way else ''} is no folder")
    checks.require(
        settings.large_images is None or not Path(settings.images).is_dir(),
        f"large_images={settings.large_images}: only an .npz of small images takes it; leave it out",
    )


def _check_crops(checks: Checks, settings: TrainingSettings) -> None:
    checks.number("zoom", settings.zoom, 0, 1)
    checks.number("close_up", settings.close_up, 0, 1)
    checks.number("min_crop", settings.min_crop, 0, 1, open_low=True)
    checks.require(
        not settings.zoom + settings.close_up > 1,
        f"zoom={settings.zoom}, close_up={settings.close_up}: their sum must be at most 1",
    )
    npz_alone = settings.images.endswith(".npz") and settings.large_images is None
    checks.require(
        settings.close_up == 0 or not npz_alone,
        f"close_up={settings.close_up}: an .npz of small images has no close-ups; name large_images",
    )


def _check_autoencoder(checks: Checks, stage: AutoencoderSettings) -> None:
    _limited(checks, "autoencoder.patch", stage.patch, 1, 64)
    _limited(checks, "autoencoder.latent_channels", stage.latent_channels, 1, 1024)
    _check_widths(checks, "autoencoder", stage)
    checks.number("autoencoder.gradient_weight", stage.gradient_weight, 0, LARGEST)
    checks.number("autoencoder.kl_weight", stage.kl_weight, 0, LARGEST)


def _check_denoiser(checks: Checks, stage: DenoiserSettings) -> None:
    _check_widths(checks, "denoiser", stage)
    levels, key = len(stage.channels), "denoiser.attention_levels"
    checks.require(
        0 <= stage.attention_levels <= levels,
        f"{key}={_short(stage.attention_levels)}: must be at least 0 and at most {levels}, "
        "the number of denoiser.channels",
    )
    attended = stage.channels[-max(stage.attention_levels, 1) :]  # the middle, as wide as the coarsest, always has it
    unfit = [width for width in attended if stage.head_channels < 1 or width % stage.head_channels]
    checks.require(
        not unfit,
        f"denoiser.head_channels={_short(stage.head_channels)}: must divide the channels with attention "
        f"({', '.join(map(str, unfit))}); the middle of the network, as wide as the last level, always has it",
    )
    for name in ("noise_scale", "sigma_data"):
        if getattr(stage, name) is not None:
            checks.number(f"denoiser.{name}", getattr(stage, name), 0, LARGEST, open_low=True)
    _check_target(checks, stage)
    checks.number("denoiser.class_dropout", stage.class_dropout, 0, 1)
    _limited(checks, "denoiser.patch", stage.patch, 1, 64)
    checks.number("denoiser.log_sigma_mean", stage.log_sigma_mean, -20, 20)
    checks.number("denoiser.log_sigma_std", stage.log_sigma_std, 0, 20)
    _limited(checks, "denoiser.bank_views", stage.bank_views, 1, 10_000)


def _check_target(checks: Checks, stage: DenoiserSettings) -> None:
    checks.choice("denoiser.target", stage.target, TARGETS)
    checks.require(
        not stage.zero_terminal_snr or stage.target in ("v", "x0"),
        f"denoiser.zero_terminal_snr=true: where there is no signal denoiser.target={stage.target} says nothing of the "
        "image; use v or x0",
    )
    if stage.min_snr_gamma is not None:
        checks.number("denoiser.min_snr_gamma", stage.min_snr_gamma, 0, LARGEST, open_low=True)
    checks.number("denoiser.noise_offset", stage.noise_offset, 0, 10)


def _check_widths(checks: Checks, name: str, stage: AutoencoderSettings | DenoiserSettings) -> None:
    """Levels, their widths, and the groups and blocks in them."""
    _limited(checks, f"{name}.layers", stage.layers, 1, 16)
    key = f"{name}.channels"
    widths = stage.channels
    groups = stage.norm_groups
    if not 1 <= len(widths) <= MOST_LEVELS or not all(1 <= width <= WIDEST for width in widths):
        checks.require(
            False, f"{key}={_short(widths)}: must be 1 to {MOST_LEVELS} widths, each at least 1 and at most {WIDEST}"
        )
        return
    unfit = [str(width) for width in widths if groups < 1 or width % groups]
    checks.require(
        not unfit,
        f"{name}.norm_groups={_short(groups)}: must be at least 1 and divide every width of {key}={_short(widths)}",
    )


def _check_resolution(checks: Checks, settings: TrainingSettings) -> None:
    kind = TRANSFORMS.get(settings.encoding)
    checks.require(
        settings.denoiser.target == "edm" or kind is None or len(kind.parts(1)) == 1,
        f"denoiser.target={settings.denoiser.target}: parts with noise of their own (encoding={settings.encoding}) are "
        "trained with edm",
    )
    one, two = settings.autoencoder, settings.denoiser
    halvings, patch = min(max(len(two.channels), 1), MOST_LEVELS) - 1, max(two.patch, 1)
    named = "denoiser.patch, halved at each further level of the network"
    if settings.encoding == "autoencoder":
        halvings += min(max(len(one.channels), 1), MOST_LEVELS) - 1
        patch = max(one.patch, 1)
        named = "autoencoder.patch, halved at each further level of both networks"
        checks.require(
            two.patch == 1, f"denoiser.patch={_short(two.patch)}: latents of an autoencoder take none; use 1"
        )
    elif settings.encoding != "pixels":
        halvings, named = halvings + 1, f"{named}, and once by encoding={settings.encoding}"
    divisor = patch * 2**halvings
    checks.require(
        0 < settings.resolution <= LARGEST_SIDE and settings.resolution % divisor == 0,
        f"resolution={_short(settings.resolution)}: must be a multiple of {divisor} ({named}) and at most "
        f"{LARGEST_SIDE}",
    )


def _check_loop(checks: Checks, key: str, loop: LoopSettings) -> None:
    checks.number(f"{key}.learning_rate", loop.learning_rate, 0, LARGEST_RATE, open_low=True)
    checks.number(f"{key}.gradient_clip", loop.gradient_clip, 0, LARGEST, open_low=True)
    checks.number(f"{key}.ema_decay", loop.ema_decay, 0, 1)
    checks.require(loop.ema_decay != 1, f"{key}.ema_decay=1: must be less than 1, or the average never moves")
    for name in ("num_steps", "warmup_steps", "log_every", "checkpoint_every"):
        _limited(checks, f"{key}.{name}", getattr(loop, name), 1, MOST_STEPS)
    _limited(checks, f"{key}.batch_size", loop.batch_size, 1, 65_536)


def _limited(checks: Checks, key: str, value: int, low: int, high: int) -> None:
    """As :meth:`particledaps.checks.Checks.number`, for integers of any length."""
    checks.require(low <= value <= high, f"{key}={_short(value)}: must be at least {low} and at most {high}")


def _short(value: object) -> str:
    text = str(value).replace(" ", "")
    return text if len(text) <= 40 else f"{text[:40]}..."
