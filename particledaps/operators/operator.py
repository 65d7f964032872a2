"""What an operator is: a map from images to measurements, its noise and its exact ambiguities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import NamedTuple

import torch

CLEAR = 3.0
"""An entry this many standard deviations of the noise above 0 is a signal."""

Objective = Callable[["torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]
"""``objective(x) -> (loss (B,), gradient of the loss like x)``."""


class Symmetry(NamedTuple):
    """A map ``g`` of images with ``A(g(x)) = A(x)``; every one here is its own inverse."""

    name: str
    apply: Callable[[torch.Tensor], torch.Tensor]


class NoiseFloor(NamedTuple):
    """The loss expected at the truth, given y, and its standard deviation; both ``(B,)``."""

    mean: torch.Tensor
    std: torch.Tensor


class Halves(NamedTuple):
    """Two independent noisy copies of one measurement, each shaped like it.

    Attributes:
        fit: one copy.
        held: the other.
        floor: ``(B,)`` loss expected at the truth on either copy.
    """

    fit: torch.Tensor
    held: torch.Tensor
    floor: torch.Tensor


IDENTITY = Symmetry("identity", lambda x: x)


class Operator(ABC):
    """``y = A(x) + noise_sigma * N(0, 1)`` on images ``(B, C, H, W)`` in [-1, 1]; immutable once built.

    Attributes:
        name: for records.
        noise_sigma: standard deviation of the noise on every entry of ``y``.
        linear: is ``A(x) - A(0)`` linear in ``x``?
        image_like: ``y`` is itself an image ``(C, h, w)`` in about [-1, 1].
        part_name: what a random operator draws (``mask``, ``kernel``); None for a deterministic one.
        part: the drawn part; None until :meth:`for_image` or :meth:`with_part` has set it.
        per_image: draw the part anew for each image; otherwise all images of a run share one.
    """

    name: str
    noise_sigma: float
    linear: bool = False
    image_like: bool = False
    part_name: str | None = None
    part: torch.Tensor | None = None
    per_image: bool = False

    def for_image(self, image_shape: tuple[int, int, int], generator: torch.Generator) -> Operator:
        """The operator of one image ``(C, H, W)``, with what is random drawn from ``generator`` (a CPU generator).

        Raises:
            ValueError: the operator cannot be applied to images of this shape.
        """
        self.measurement_shape(image_shape)
        return self

    def with_part(self, part: torch.Tensor) -> Operator:
        """The operator with a given mask or kernel, as a measurement from elsewhere needs it.

        Raises:
            ValueError: the part has a wrong shape or wrong values, or the operator has none.
        """
        raise ValueError(f"{self.name} has no random part")

    def with_noise(self, noise_sigma: float) -> Operator:
        """The same operator for a measurement of another noise level.

        Raises:
            ValueError: it is not positive.
        """
        other = copy(self)
        other.noise_sigma = check_noise(noise_sigma)
        return other

    def picture(self, y: torch.Tensor) -> torch.Tensor | None:
        """One measurement as an image ``(C, h, w)`` in [-1, 1] to look at; None where it is no image."""
        return y if self.image_like else None

    def pseudo_inverse(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor | None:
        """A plain image ``(B, C, H, W)`` from ``y`` without a prior, to compare with; None where there is none."""
        return None

    @abstractmethod
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``A(x)``, one tensor expression for the whole batch, differentiable."""

    @abstractmethod
    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape of the measurement of one image ``(C, H, W)``, without the batch axis."""

    def measure(self, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """``A(x)`` plus noise drawn from ``generator`` (a CPU generator, so that devices agree)."""
        clean = self(x)
        noise = torch.randn(clean.shape, generator=generator, dtype=clean.dtype)
        return clean + self.noise_sigma * noise.to(clean.device)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Sum of squared residuals over every entry of ``y``, ``(B,)``."""
        return (self(x) - y).square().flatten(1).sum(1)

    def objective(self, y: torch.Tensor) -> Objective:
        """Loss and gradient as a function of ``x`` for fixed ``y``; what depends on ``y`` alone is done once."""

        def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_(True)
                loss = self.loss(leaf, y)
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            return loss.detach(), gradient

        return evaluate

    def high_snr_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Sum of squared residuals over the entries of ``y`` above :data:`CLEAR` standard deviations of its noise."""
        clear = y.abs() > CLEAR * self.noise_sigma
        return ((self(x) - y) * clear).square().flatten(1).sum(1)

    def noise_floor(self, y: torch.Tensor) -> NoiseFloor:
        r""":math:`n \sigma^2 \pm \sigma^2 \sqrt{2 n}` with ``n`` entries of ``y``, where nothing better is known."""
        entries = y[0].numel()
        mean = y.new_full((len(y),), entries * self.noise_sigma**2)
        return NoiseFloor(mean, mean * (2 / entries) ** 0.5)

    def estimated_noise_sigma(self, y: torch.Tensor) -> torch.Tensor | None:
        """Noise level that ``y`` itself reveals, ``(B,)``, or None where it reveals none."""
        return None

    @property
    def can_split(self) -> bool:
        """Does :meth:`split` give two copies?"""
        return type(self).split is not Operator.split

    def split(self, y: torch.Tensor) -> Halves | None:
        """Two copies of ``y`` with independent noise, where it holds them: fit one, validate on the other."""
        return None

    def symmetries(self) -> tuple[Symmetry, ...]:
        """The natural ambiguities, the identity first."""
        return (IDENTITY,)

    def channel_symmetries(self, channels: int) -> tuple[Symmetry, ...]:
        """The ambiguities of single channels, the identity first; empty where channels have none of their own."""
        return ()


class LinearOperator(Operator):
    """A linear ``A`` with its adjoint: loss and gradient ``2 A^T (A x - y)`` without automatic differentiation."""

    linear = True

    @abstractmethod
    def adjoint(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        """``A^T y`` ``(B, C, H, W)``: ``<A x, y> = <x, A^T y>``."""

    def objective(self, y: torch.Tensor) -> Objective:
        def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                residual = self(x) - y
                return residual.square().flatten(1).sum(1), 2 * self.adjoint(residual, image_shape_of(x))

        return evaluate


def image_shape_of(x: torch.Tensor) -> tuple[int, int, int]:
    """``(C, H, W)`` of images ``(B, C, H, W)``."""
    channels, height, width = x.shape[1:]
    return channels, height, width


def check_noise(noise_sigma: float) -> float:
    """``noise_sigma`` as a float.

    Raises:
        ValueError: it is not positive.
    """
    if not noise_sigma > 0:
        raise ValueError(f"noise_sigma={noise_sigma}: must be positive")
    return float(noise_sigma)


def pixels(value: float, image_shape: tuple[int, int, int], reference_side: int | None) -> float:
    """A length given for images of ``reference_side`` px in pixels of ``image_shape`` (by its shorter side)."""
    return value if reference_side is None else value * min(image_shape[1:]) / reference_side


def check_reference_side(reference_side: int | None) -> int | None:
    """``reference_side`` itself.

    Raises:
        ValueError: it is below 1.
    """
    if reference_side is not None and reference_side < 1:
        raise ValueError(f"reference_side={reference_side}: must be at least 1, or null for lengths in pixels")
    return reference_side
