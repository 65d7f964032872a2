"""Train a prior on a folder of images (or an ``.npz``): autoencoder, denoiser, export.

Examples::

    python train_prior.py name=dogs64 images=/my/dogs export_dir=assets/dogs64
    python train_prior.py name=dogs64px images=/my/dogs export_dir=assets/dogs64px encoding=pixels denoiser.patch=2

Every stage logs curves, saves checkpoints and, started again, goes on exactly where it stopped.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch is loaded
    from particledaps.settings.start_up import begin

    begin("train_prior.py")

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from particledaps.checks import DataError, SettingsError
from particledaps.data.training_views import Augmentation, TrainingImages, load_training_images, step_generator
from particledaps.files import write_atomically
from particledaps.priors.autoencoder import KLAutoencoder
from particledaps.priors.embedded import read_config
from particledaps.priors.errors import PriorError
from particledaps.priors.transforms import TRANSFORMS, Transform
from particledaps.runs.draw import draw_samples
from particledaps.settings.command_line import CONFIG_DIR, exit_stopped, fail, member, register, run
from particledaps.settings.start_up import ready
from particledaps.settings.statuses import DISK, FAILED, disk_fault
from particledaps.training.autoencoder import build as build_autoencoder
from particledaps.training.autoencoder import train_autoencoder
from particledaps.training.denoiser import Bank, LatentFacts, latent_bank, latent_facts, train_denoiser, wrap
from particledaps.training.denoiser import build as build_denoiser
from particledaps.training.export import export_prior
from particledaps.training.loop import DivergedError, load_weights
from particledaps.training.settings import STAGES, TrainingSettings, validate

PROGRAM = "train_prior.py"
LATENTS = "latents.json"
"""In the denoiser's folder: what it was built for, so that an export need not encode the images again."""
register("training_settings", TrainingSettings)


def standardised(network: torch.nn.Module, patch: int, data: TrainingImages, seed: int) -> KLAutoencoder:
    """Wrap a trained network with the channel means and deviations of its latents over 1 024 training views."""
    device = next(network.parameters()).device
    raw = KLAutoencoder(network, patch, torch.zeros(1), torch.ones(1)).to(device)
    with torch.no_grad():
        views = [raw.encode(data.batch(64, step_generator(seed + 5, s)).to(device)) for s in range(16)]
    latents = torch.cat(views).transpose(0, 1).flatten(1)
    if not (latents.std(1) > 0).all():  # also NaN
        raise DataError("the latents of the training images do not vary in every channel: are the images all alike?")
    return KLAutoencoder(network, patch, latents.mean(1), latents.std(1)).to(device)


def load_stage(folder: Path, network: torch.nn.Module) -> torch.nn.Module:
    """The EMA weights of a finished or running stage."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        raise DataError(f"{path} does not exist: run that stage first")
    load_weights(network, torch.load(path, map_location="cpu", weights_only=True)["ema"], path)
    return network.eval().requires_grad_(False)


def train(settings: TrainingSettings) -> None:
    """Run the stages that ``settings.stages`` names."""
    validate(settings)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device=cuda: torch sees no CUDA device; use device=cpu or device=auto")
    device = torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")
    folder = Path(settings.save_dir) / settings.name
    data = load_data(settings)
    autoencoder: Transform | KLAutoencoder
    if settings.encoding in TRANSFORMS:
        autoencoder = TRANSFORMS[settings.encoding]()
    else:
        autoencoder = trained_autoencoder(settings, data, folder / "autoencoder", device)
    if {"denoiser", "export"}.isdisjoint(settings.stages):
        return
    stage, bank = folder / "denoiser", None
    latents = kept_facts(stage, settings, data)
    if latents is None or "denoiser" in settings.stages:
        bank = latent_bank(autoencoder, data, settings.denoiser.bank_views, settings.seed, device)
        latents = latents or facts_of(settings, bank, data)
    if bank is not None and "denoiser" in settings.stages:
        torch.manual_seed(settings.seed + 1)
        keep_facts(stage, latents)
        train_denoiser(autoencoder, settings.denoiser, bank, latents, data.validation, stage, settings.seed, device)
    if "export" in settings.stages:
        export(settings, autoencoder.cpu(), latents, data, folder)


def load_data(settings: TrainingSettings) -> TrainingImages:
    """The training images.

    Raises:
        DataError: they cannot be read or do not fit the settings.
    """
    large = Path(settings.large_images) if settings.large_images else None
    views = Augmentation(settings.zoom, settings.min_crop, settings.close_up, settings.mirror)
    data = load_training_images(Path(settings.images), large, settings.resolution, views, settings.channels)
    if settings.class_conditional and data.labels is None:
        raise DataError(
            f"class_conditional=true: {settings.images} has no classes: an .npz needs train_labels, a folder one "
            "folder a class and no image outside"
        )
    return data if settings.class_conditional else replace(data, labels=None, class_names=())


def trained_autoencoder(
    settings: TrainingSettings, data: TrainingImages, folder: Path, device: torch.device
) -> KLAutoencoder:
    """Stage one, trained now or before, with the statistics of its latents."""
    stage = settings.autoencoder
    if "autoencoder" in settings.stages:
        torch.manual_seed(settings.seed)
        train_autoencoder(stage, data, folder, settings.seed, device)
    network = load_stage(folder, build_autoencoder(stage, settings.resolution, data.images.shape[1])).to(device)
    return standardised(network, stage.patch, data, settings.seed)


def facts_of(settings: TrainingSettings, bank: Bank, data: TrainingImages) -> LatentFacts:
    """What the denoiser is built for."""
    kind, scale = TRANSFORMS.get(settings.encoding), settings.denoiser.sigma_data
    if kind is None and scale is None:
        scale = 1.0  # the latents of a trained autoencoder are standardised
    parts = (bank.latents.shape[1],) if kind is None else kind.parts(data.images.shape[1])
    return latent_facts(bank, parts, scale, len(data.class_names))


def keep_facts(stage: Path, latents: LatentFacts) -> None:
    """Write what the denoiser is built for: a training that goes on, or is exported, uses the same."""
    stage.mkdir(parents=True, exist_ok=True)
    write_atomically(stage / LATENTS, json.dumps(asdict(latents)) + "\n")


def kept_facts(stage: Path, settings: TrainingSettings, data: TrainingImages) -> LatentFacts | None:
    """What :func:`keep_facts` wrote; None where no training began.

    Raises:
        DataError: it is unreadable, or of other parts or classes than these settings ask for.
    """
    path = stage / LATENTS
    if not path.exists():
        return None
    try:
        found = LatentFacts(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged: remove it, and the denoiser stage writes it anew") from error
    kind = TRANSFORMS.get(settings.encoding)
    count = 1 if kind is None else len(kind.parts(1))
    if found.num_levels != count or found.num_classes != len(data.class_names):
        raise DataError(
            f"{path} is of a training with {found.num_levels} parts and {found.num_classes} classes, these settings "
            f"ask for {count} and {len(data.class_names)}; choose another name= or remove its folder"
        )
    return replace(found, shape=tuple(found.shape), parts=tuple(found.parts))


def export(
    settings: TrainingSettings, autoencoder: torch.nn.Module, latents: LatentFacts, data: TrainingImages, folder: Path
) -> None:
    """Write the prior, its figures and a grid of samples."""
    network = load_stage(folder / "denoiser", build_denoiser(settings.denoiser, latents))
    facts: dict[str, Any] = {"name": settings.name, "source": settings.source, "licence": settings.licence}
    stages = STAGES[:2] if isinstance(autoencoder, KLAutoencoder) else STAGES[1:2]
    facts |= {"sigma_data": latents.sigma_data}
    if settings.denoiser.noise_offset > 0:
        facts["noise_offset"] = settings.denoiser.noise_offset
    facts |= {"seed": settings.seed, "training": {stage: progress(folder / stage) for stage in stages}}
    if data.class_names:
        facts["class_names"] = list(data.class_names)
    target = Path(settings.export_dir)
    prior = export_prior(target, autoencoder, wrap(network, settings.denoiser, latents), facts, data.validation)
    print(json.dumps(read_config(target)["figures"], indent=1))
    draw_samples(prior, target / "samples.png", settings.seed)


def progress(folder: Path) -> dict[str, float]:
    """Steps, batch size and minutes of a stage, for the card."""
    state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
    batch = json.loads(state["settings"])["batch_size"]
    return {"steps": state["step"], "batch_size": batch, "minutes": round(state["seconds"] / 60, 1)}


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train_prior")
@member(PROGRAM)
def main(config: DictConfig) -> None:
    """Compose, check and train; errors end in one sentence and a non-zero status."""
    ready()
    try:
        train(OmegaConf.to_object(config))
    except (SettingsError, DataError) as error:
        fail(PROGRAM, str(error))
    except (DivergedError, PriorError) as error:
        fail(PROGRAM, str(error), FAILED)
    except OSError as error:
        fail(PROGRAM, disk_fault(error), DISK)
    except KeyboardInterrupt as stop:
        exit_stopped(PROGRAM, stop, "the same command goes on from the last checkpoint")


if __name__ == "__main__":
    run(PROGRAM, "train_prior", main)
