"""Which weights a prior has: a checksum that costs milliseconds even for large networks."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from particledaps.priors.prior import Prior

SAMPLES = 1024
"""Values of each tensor that enter the checksum, evenly spread over it."""


def prior_sha256(prior: Prior) -> str:
    """Checksum of names, shapes and evenly spread values of the weights of a prior; training changes all of them.

    Parts that are no modules count by their class alone.
    """
    digest = hashlib.sha256(f"{prior.latent_shape}{prior.image_shape}{prior.condition}".encode())
    for part in (prior.autoencoder, prior.denoiser):
        digest.update(type(part).__name__.encode())
        for name, value in part.state_dict().items() if isinstance(part, nn.Module) else ():
            digest.update(f"{name}{tuple(value.shape)}".encode())
            digest.update(_spread(value).numpy().tobytes())
    return digest.hexdigest()


def _spread(value: torch.Tensor) -> torch.Tensor:
    flat = value.detach().reshape(-1)
    return flat[:: max(len(flat) // SAMPLES, 1)].float().cpu().contiguous()
