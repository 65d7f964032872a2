"""Train a prior on a folder of images (or an ``.npz``): autoencoder, denoiser, export.

Example::

    python train_prior.py name=dogs64 images=/my/dogs export_dir=assets/dogs64

Every stage logs curves, saves checkpoints and, started again, goes on exactly where it stopped.
"""

from __future__ import annotations

import json
from pathlib import Path

if __name__ == "__main__":  # before torch is loaded
    from particledaps.settings.start_up import begin

    begin("train_prior.py")

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from particledaps.checks import DataError, SettingsError
from particledaps.data.training_views import TrainingImages, load_training_images, step_generator
from particledaps.priors.autoencoder import KLAutoencoder
from particledaps.priors.embedded import read_config
from particledaps.priors.errors import PriorError
from particledaps.runs.draw import draw_samples
from particledaps.settings.command_line import CONFIG_DIR, exit_stopped, fail, member, register, run
from particledaps.settings.start_up import ready
from particledaps.settings.statuses import DISK, FAILED, disk_fault
from particledaps.training.autoencoder import build as build_autoencoder
from particledaps.training.autoencoder import train_autoencoder
from particledaps.training.denoiser import build as build_denoiser
from particledaps.training.denoiser import train_denoiser
from particledaps.training.export import export_prior
from particledaps.training.loop import DivergedError, load_weights
from particledaps.training.settings import TrainingSettings, validate

PROGRAM = "train_prior.py"
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
    large = Path(settings.large_images) if settings.large_images else None
    data = load_training_images(
        Path(settings.images), large, settings.resolution, settings.zoom, settings.min_crop, settings.close_up
    )
    stage_one = settings.autoencoder

    if "autoencoder" in settings.stages:
        torch.manual_seed(settings.seed)
        train_autoencoder(stage_one, data, folder / "autoencoder", settings.seed, device)
    network = load_stage(folder / "autoencoder", build_autoencoder(stage_one, settings.resolution)).to(device)
    autoencoder = standardised(network, stage_one.patch, data, settings.seed)
    if "denoiser" in settings.stages:
        torch.manual_seed(settings.seed + 1)
        train_denoiser(autoencoder, settings.denoiser, data, folder / "denoiser", settings.seed, device)
    if "export" in settings.stages:
        export(settings, autoencoder.cpu(), data, folder)


def export(settings: TrainingSettings, autoencoder: KLAutoencoder, data: TrainingImages, folder: Path) -> None:
    """Write the prior, its figures and a grid of samples."""
    side = settings.resolution // settings.autoencoder.patch // 2 ** (len(settings.autoencoder.channels) - 1)
    shape = (settings.autoencoder.latent_channels, side, side)
    unet = load_stage(folder / "denoiser", build_denoiser(settings.denoiser, shape))
    facts = {"name": settings.name, "source": settings.source, "licence": settings.licence, "seed": settings.seed}
    facts["training"] = {stage: progress(folder / stage) for stage in ("autoencoder", "denoiser")}
    target = Path(settings.export_dir)
    prior = export_prior(target, autoencoder, unet, settings.denoiser, facts, data.validation)
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
