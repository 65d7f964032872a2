"""What a run costs in network calls, one call being one particle through one network.

Decoder calls with a gradient (forward and backward) are the currency in which samplers are compared: they are what
MCMC and latent optimisation spend, and unlike seconds they mean the same on every machine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from particledaps.diffusion.score import Denoiser
from particledaps.priors.autoencoder import Autoencoder
from particledaps.priors.prior import Prior


@dataclass
class Calls:
    """Calls so far, in particles.

    Attributes:
        decoder_gradient: decoder forward, to be followed by its backward.
        decoder: decoder forward alone.
        encoder: encoder forward.
        denoiser: denoiser forward.
    """

    decoder_gradient: int = 0
    decoder: int = 0
    encoder: int = 0
    denoiser: int = 0

    def since(self, before: Calls) -> dict[str, int]:
        """What was added after ``before``."""
        return {name: value - getattr(before, name) for name, value in asdict(self).items()}

    def copy(self) -> Calls:
        """The counts as they stand."""
        return replace(self)


class _CountedAutoencoder:
    def __init__(self, autoencoder: Autoencoder, calls: Calls) -> None:
        self.autoencoder, self.calls = autoencoder, calls

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.encoder += len(x)
        return self.autoencoder.encode(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and z.requires_grad:
            self.calls.decoder_gradient += len(z)
        else:
            self.calls.decoder += len(z)
        return self.autoencoder.decode(z)


class _CountedDenoiser:
    def __init__(self, denoiser: Denoiser, calls: Calls) -> None:
        self.denoiser, self.calls = denoiser, calls

    def __call__(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        self.calls.denoiser += len(z)
        return self.denoiser(z, sigma)

    def __getattr__(self, name: str) -> Any:
        """What else the denoiser has, such as its density ``log_prob``."""
        return getattr(self.denoiser, name)


def count_calls(prior: Prior, calls: Calls) -> Prior:
    """The same prior, adding every call to ``calls``."""
    return replace(
        prior,
        autoencoder=_CountedAutoencoder(prior.autoencoder, calls),
        denoiser=_CountedDenoiser(prior.denoiser, calls),
    )
