"""Settings of ``train_prior.py``."""

from dataclasses import dataclass, field

from runs.checks import Checks
from runs.device import DEVICES
from training.autoencoder import AutoencoderSettings
from training.latent_diffusion import DenoiserSettings

STAGES = ("autoencoder", "denoiser", "export")


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
        stages: stages to run, in this order: autoencoder, denoiser, export.
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
    for stage in settings.stages:
        checks.choice("stages", stage, STAGES)
    checks.choice("device", settings.device, DEVICES)
    checks.number("zoom", settings.zoom, 0, 1)
    checks.number("close_up", settings.close_up, 0, 1)
    checks.require(
        settings.zoom + settings.close_up <= 1,
        f"zoom={settings.zoom}, close_up={settings.close_up}: their sum must be at most 1",
    )
    npz_alone = settings.images.endswith(".npz") and settings.large_images is None
    checks.require(
        settings.close_up == 0 or not npz_alone,
        f"close_up={settings.close_up}: an .npz of small images has no close-ups; name large_images",
    )
    checks.number("min_crop", settings.min_crop, 0, 1, open_low=True)
    checks.number("seed", settings.seed, 0)
    one, two = settings.autoencoder, settings.denoiser
    halvings = len(one.channels) + len(two.channels) - 2
    divisor = max(one.patch, 1) * 2**halvings
    checks.require(
        settings.resolution > 0 and settings.resolution % divisor == 0,
        f"resolution={settings.resolution}: must be a multiple of {divisor} "
        "(autoencoder.patch, halved at each further level of both networks)",
    )
    checks.number("autoencoder.patch", one.patch, 1)
    for stage, loop in (("autoencoder", one.loop), ("denoiser", two.loop)):
        checks.number(f"{stage}.loop.learning_rate", loop.learning_rate, 0, open_low=True)
        for key in ("num_steps", "batch_size", "warmup_steps", "log_every", "checkpoint_every"):
            checks.number(f"{stage}.loop.{key}", getattr(loop, key), 1)
    checks.finish()
