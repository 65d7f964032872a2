"""Settings of ``train_prior.py``."""

from dataclasses import dataclass, field

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
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    export_dir: str = "assets/prior"
    source: str = "not stated"
    licence: str = "not stated"
    seed: int = 42
    device: str = "auto"
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    denoiser: DenoiserSettings = field(default_factory=DenoiserSettings)
