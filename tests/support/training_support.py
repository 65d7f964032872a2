"""Tiny stages and data for the tests of training."""

import csv
from dataclasses import replace

import torch
from tiny import AUTOENCODER, DENOISER, LATENTS, RESOLUTION

from particledaps.priors.autoencoder import KLAutoencoder
from particledaps.training.autoencoder import build, train_autoencoder
from particledaps.training.denoiser import latent_bank, train_denoiser
from particledaps.training.loop import LoopSettings

CPU = torch.device("cpu")
TINY = (
    "resolution=16",
    "device=cpu",
    "autoencoder.channels=[8,8]",
    "autoencoder.norm_groups=4",
    "denoiser.channels=[8,8]",
    "denoiser.attention_levels=0",
    "denoiser.norm_groups=4",
    "denoiser.head_channels=4",
    "denoiser.bank_views=1",
    *(f"{s}.loop.{k}" for s in ("autoencoder", "denoiser") for k in ("num_steps=4", "batch_size=4", "bfloat16=false")),
)
"""A whole training of the command line in seconds."""
FEW_STEPS = LoopSettings(7, 4, 2e-3, warmup_steps=2, log_every=1, checkpoint_every=3)


def autoencoder_of(seed):
    torch.manual_seed(seed)
    return KLAutoencoder(build(AUTOENCODER, RESOLUTION), 2, torch.zeros(4), torch.ones(4))


def train_stage(stage, data, folder, loop, initial_seed):
    """One stage; ``initial_seed`` seeds the fresh weights only."""
    frozen = autoencoder_of(0)
    torch.manual_seed(initial_seed)
    if stage == "autoencoder":
        return train_autoencoder(replace(AUTOENCODER, loop=loop), data, folder, 3, CPU)
    bank = latent_bank(frozen, data, 1, 3, CPU)
    return train_denoiser(frozen, replace(DENOISER, loop=loop), bank, LATENTS, data.validation, folder, 3, CPU)


def curve(folder):
    with open(folder / "curve.csv", newline="") as handle:
        return list(csv.reader(handle))
