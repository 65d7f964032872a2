"""A prior: an autoencoder, a denoiser of its latents and the facts a sampler needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from particledaps.diffusion.score import Denoiser
from particledaps.priors.autoencoder import Autoencoder, IdentityAutoencoder
from particledaps.priors.conditioning import Condition, Conditions, conditioned
from particledaps.priors.errors import PriorError
from particledaps.priors.transforms import Transform

__all__ = ["Prior", "PriorError", "in_autocast", "in_bfloat16"]

Pullback = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True)
class Prior:
    """What the sampler knows of a model.

    Attributes:
        name: for records.
        autoencoder: between images in [-1, 1] and latents; the identity for pixel priors.
        denoiser: ``D(z; sigma)`` in latent space.
        image_shape: ``(C, H, W)`` of a decoded image.
        latent_shape: ``(c, h, w)``.
        latent_std: standard deviation of the latents.
        misfit_excess: mean and spread over validation images of the loss above the noise floor that the best fit of
            the decoder to the truth still has, per operator name; empty where it was not measured. A spread of 0
            stands for an unknown one (a single validation image): runs then allow for the noise's alone.
        condition: what the denoiser is conditioned on, for records.
        decode_batch: decode (and differentiate) at most this many latents at once, to save memory; None: all.
        parts: channels of each part of the latents that has noise of its own, the finest first; empty: one part.
        conditions: what :meth:`conditioned` takes; None: the prior is unconditional.
        redundant: some parts are functions of others; ``encode(decode(z))`` makes them agree.
    """

    name: str
    autoencoder: Autoencoder
    denoiser: Denoiser
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    latent_std: float = 1.0
    misfit_excess: dict[str, tuple[float, float]] | None = None
    condition: str | None = None
    decode_batch: int | None = None
    parts: tuple[int, ...] = ()
    conditions: Conditions | None = None
    redundant: bool = False

    def __post_init__(self) -> None:
        if self.parts and (sum(self.parts) != self.latent_shape[0] or min(self.parts) < 1):
            raise PriorError(
                f"{self.name}: the channels of its parts {self.parts} do not add up to the {self.latent_shape[0]} "
                "channels of its latents"
            )

    @property
    def is_pixel(self) -> bool:
        """Are latents the images themselves?"""
        return isinstance(self.autoencoder, IdentityAutoencoder)

    def conditioned(self, condition: Condition | None) -> Prior:
        """The same weights under a class or a text; None: under the null condition.

        Raises:
            PriorError: the prior is unconditional, or takes another kind of condition.
        """
        return conditioned(self, condition)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` in [-1, 1] -> ``(B, c, h, w)``, no gradient."""
        with torch.no_grad():
            return self.autoencoder.encode(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """``(B, c, h, w)`` -> ``(B, C, H, W)`` nominally in [-1, 1], no gradient."""
        with torch.no_grad():
            return torch.cat([self.autoencoder.decode(part) for part in z.split(self.decode_batch or len(z))])

    def decode_with_pullback(self, z: torch.Tensor) -> tuple[torch.Tensor, Pullback]:
        """Decode, and get the map from a gradient in image space to one in latent space (one backward pass)."""
        with torch.enable_grad():
            leaf = z.detach().requires_grad_(True)
            x = self.autoencoder.decode(leaf)

        def pullback(gradient: torch.Tensor) -> torch.Tensor:
            return torch.autograd.grad(x, leaf, gradient)[0]

        return x.detach(), pullback


class _Autocast(nn.Module):
    """Runs a module's calls in autocast and returns float32."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        return self._run(self.module, z, sigma)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(self.module.encode, x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self._run(self.module.decode, z)

    def __getattr__(self, name: str) -> Any:
        """What else the module has, such as a density ``log_prob``; not in autocast."""
        return super().__getattr__(name) if name == "module" else getattr(self.module, name)

    def _run(self, function: Callable[..., torch.Tensor], *inputs: torch.Tensor | float) -> torch.Tensor:
        with torch.autocast(inputs[0].device.type, self.dtype):
            return function(*inputs).float()


def in_autocast(prior: Prior, dtype: torch.dtype) -> Prior:
    """The same prior with its networks computing in ``dtype``; weights, latents, ODE and losses stay float32."""
    conditions, autoencoder = prior.conditions, prior.autoencoder
    if not isinstance(autoencoder, IdentityAutoencoder | Transform):  # those have no arithmetic to save
        autoencoder = _Autocast(autoencoder, dtype)
    if conditions is not None:
        plain = conditions.build
        conditions = replace(conditions, build=lambda condition: _Autocast(plain(condition), dtype))
    return replace(prior, autoencoder=autoencoder, denoiser=_Autocast(prior.denoiser, dtype), conditions=conditions)


def in_bfloat16(prior: Prior) -> Prior:
    """:func:`in_autocast` with bfloat16."""
    return in_autocast(prior, torch.bfloat16)
