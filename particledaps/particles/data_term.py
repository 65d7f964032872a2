"""What the measurement says of latents, or of images: the data loss, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from particledaps.operators.operator import Objective, Operator
    from particledaps.priors.prior import Prior


class Data(Protocol):
    """Data losses ``(P,)`` and, if asked for, their gradients like ``x``."""

    def __call__(self, x: torch.Tensor, with_gradient: bool, /) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class PixelTerm:
    """Loss of images and its gradient: the operator forward and its adjoint, no network.

    Args:
        operator: its loss.
        y: ``(P, ...)`` one measurement a particle.
    """

    def __init__(self, operator: Operator, y: torch.Tensor) -> None:
        self.objective = operator.objective(y)

    def __call__(self, x: torch.Tensor, with_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        loss, gradient = self.objective(x)
        return loss, gradient if with_gradient else None


class DataTerm:
    """Loss of decoded latents and its latent gradient: one decoder forward, one backward.

    Args:
        prior: its decoder; at most ``prior.decode_batch`` particles at once.
        operator: its loss.
        y: ``(P, ...)`` one measurement a particle.
        gradient_clamp: if set, clamp the latent gradient elementwise.
    """

    def __init__(self, prior: Prior, operator: Operator, y: torch.Tensor, gradient_clamp: float | None = None) -> None:
        self.prior = prior
        self.size = prior.decode_batch or len(y)
        self.gradient_clamp = gradient_clamp
        self.objectives = [operator.objective(part) for part in y.split(self.size)]

    def __call__(self, z: torch.Tensor, with_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Losses ``(P,)`` and, if asked for, gradients like ``z``."""
        if not with_gradient:
            parts = zip(z.split(self.size), self.objectives, strict=True)
            return torch.cat([objective(self.prior.decode(part))[0] for part, objective in parts]), None
        return self.differentiate(z)

    def differentiate(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses ``(P,)`` and gradients like ``z``."""
        parts = zip(z.split(self.size), self.objectives, strict=True)
        losses, gradients = zip(*(self._differentiate(*part) for part in parts), strict=True)
        return torch.cat(losses), torch.cat(gradients)

    def _differentiate(self, z: torch.Tensor, objective: Objective) -> tuple[torch.Tensor, torch.Tensor]:
        x, pullback = self.prior.decode_with_pullback(z)
        loss, image_gradient = objective(x)
        gradient = pullback(image_gradient)
        if self.gradient_clamp is not None:
            gradient = gradient.clamp(-self.gradient_clamp, self.gradient_clamp)
        return loss, gradient


class Expected(NamedTuple):
    """Data loss expected at the answer, and its standard deviation."""

    mean: float
    std: float


def expected_loss(prior: Prior, operator: Operator, y: torch.Tensor) -> Expected:
    """The noise floor of one measurement ``y`` ``(1, ...)`` and what ``prior`` misses of images in general."""
    floor, (excess, spread) = operator.noise_floor(y), (prior.misfit_excess or {}).get(operator.name, (0.0, 0.0))
    return Expected(floor.mean.item() + excess, (floor.std.item() ** 2 + spread**2) ** 0.5)
