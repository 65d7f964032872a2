"""From a diffusers scheduler configuration to a denoiser: betas and prediction type are read, never guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from particledaps.diffusion.denoiser import EpsilonDenoiser, FlowDenoiser, Network, NoiseMap, VDenoiser, X0Denoiser
from particledaps.diffusion.noise import (
    ContinuousScaledVPNoise,
    ContinuousVPNoise,
    DiscreteNoise,
    FlowNoise,
    alphas_cumprod,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_snr,
)
from particledaps.priors.config_keys import FLOW, check_scheduler_config
from particledaps.priors.diffusers_folder import CheckpointFolder, read_json
from particledaps.priors.errors import PriorError

DENOISERS = {"epsilon": EpsilonDenoiser, "v_prediction": VDenoiser, "sample": X0Denoiser}
BETAS = {"linear": linear_betas, "scaled_linear": scaled_linear_betas}
COSINE = "squaredcos_cap_v2"
MOST_TIMESTEPS = 1_000_000
Denoiser = EpsilonDenoiser | VDenoiser | X0Denoiser | FlowDenoiser


def read_scheduler(folder: CheckpointFolder) -> dict[str, Any]:
    """``scheduler_config.json`` of a checkpoint, checked.

    Raises:
        PriorError: it is missing, or describes no discrete schedule that is known here.
    """
    path = _config_path(folder)
    config = read_json(path)
    if config.get("_class_name") == FLOW:
        check_scheduler_config(config, path)
        return config
    prediction, schedule = config.get("prediction_type", "epsilon"), config.get("beta_schedule")
    if str(prediction) not in DENOISERS:
        raise PriorError(f"{path}: prediction_type={prediction}: allowed are {', '.join(DENOISERS)}")
    if config.get("trained_betas") is None and schedule not in (*BETAS, COSINE):
        kind = config.get("_class_name", "the scheduler")
        raise PriorError(
            f"{path}: {kind} has beta_schedule={schedule}: allowed are {', '.join((*BETAS, COSINE))} or trained_betas"
        )
    check_scheduler_config(config, path)
    if config.get("rescale_betas_zero_snr") and prediction == "epsilon":
        raise PriorError(
            f"{path}: rescale_betas_zero_snr=true with prediction_type=epsilon: its last timestep is pure noise, from "
            "which a network that predicts the noise learns nothing of the image; such networks predict v or the sample"
        )
    return config


def _config_path(folder: CheckpointFolder) -> Path:
    below = folder.component("scheduler") or folder.path
    names = [below / "scheduler_config.json", below / "config.json"] if below != folder.path else []
    return next((p for p in names if p.is_file()), below / "scheduler_config.json")


def read_betas(config: dict[str, Any], path: Path) -> torch.Tensor:
    """The betas that a scheduler configuration describes, float64 ``(T,)``.

    Raises:
        PriorError: they are no increasing noise.
    """
    try:
        if config.get("trained_betas") is not None:
            return torch.tensor(config["trained_betas"], dtype=torch.float64)
        count = int(config.get("num_train_timesteps", 1000))
        if not 2 <= count <= MOST_TIMESTEPS:
            raise ValueError(f"num_train_timesteps={str(count)[:40]} is not from 2 to {MOST_TIMESTEPS}")
        if config["beta_schedule"] == COSINE:
            return cosine_betas(count)
        return BETAS[config["beta_schedule"]](count, float(config["beta_start"]), float(config["beta_end"]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise PriorError(f"{path}: no readable betas (beta_start, beta_end, num_train_timesteps): {error!r}") from error


def _num_timesteps(config: dict[str, Any], path: Path) -> int:
    count = config.get("num_train_timesteps", 1000)
    if type(count) is not int or not 2 <= count <= MOST_TIMESTEPS:
        raise PriorError(f"{path}: num_train_timesteps={str(count)[:40]}: must be from 2 to {MOST_TIMESTEPS}")
    return count


def build_denoiser(network: Network, folder: CheckpointFolder, timestep_map: str) -> Denoiser:
    """A network as a denoiser in sigma.

    Args:
        network: ``network(input, t) -> prediction``.
        folder: its scheduler configuration.
        timestep_map: ``native``: the checkpoint's own ``alphas_cumprod``. ``vp``: as the official DAPS code does
            it, the pixel schedule for pixel and latent networks, a continuous scaled-linear one for Stable Diffusion.
    """
    config, path = read_scheduler(folder), _config_path(folder)
    if config.get("_class_name") == FLOW:
        return FlowDenoiser(network, FlowNoise(_num_timesteps(config, path)))
    betas = read_betas(config, path)
    cumulative = zero_terminal_snr if config.get("rescale_betas_zero_snr") else alphas_cumprod
    try:
        noise: NoiseMap = DiscreteNoise(cumulative(betas))
    except ValueError as error:
        raise PriorError(f"{path}: its betas give no noise schedule: {error}") from error
    if timestep_map == "vp":
        text = folder.family == "sd"
        noise = ContinuousScaledVPNoise(betas[0].item(), betas[-1].item(), len(betas)) if text else ContinuousVPNoise()
    return DENOISERS[config.get("prediction_type", "epsilon")](network, noise)
