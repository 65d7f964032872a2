"""Physics of the library deepinv as operators, without importing it: anything with ``A`` and a noise level will do."""

from __future__ import annotations

import importlib
from copy import deepcopy
from functools import cache
from typing import Any

import torch

from particledaps.operators.operator import Objective, Operator, check_noise

RANGES = {"unit": 0.5, "symmetric": 1.0}
"""Slope of the map from [-1, 1] to the range that the physics works on."""


class PhysicsOperator(Operator):
    r"""``A(x) = physics.A(s x + 1 - s)`` with s = 1/2 for physics on [0, 1] and 1 on [-1, 1].

    Physics with an adjoint give the gradient in closed form, :math:`2 s A^T (A - y)`; others are differentiated.

    Args:
        physics: an object with ``A``; ``A_adjoint`` where it is linear; moved with ``to(device)`` where it can be.
        noise_sigma: standard deviation of the noise on ``y``; None: ``physics.noise_model.sigma``.
        data_range: ``unit`` (deepinv's images are in [0, 1]) or ``symmetric`` ([-1, 1]).
        image_like: ``y`` is an image in the same range, and drawn so.

    Raises:
        ValueError: no ``A``, no noise level, or an unknown range.
    """

    def __init__(
        self, physics: Any, noise_sigma: float | None = None, data_range: str = "unit", image_like: bool = False
    ) -> None:
        if not callable(getattr(physics, "A", None)):
            raise ValueError(f"physics={type(physics).__name__}: has no method A")
        if data_range not in RANGES:
            raise ValueError(f"data_range={data_range}: allowed are {', '.join(RANGES)}")
        sigma = _noise_level(physics) if noise_sigma is None else noise_sigma
        if sigma is None:
            raise ValueError(f"noise_sigma: {type(physics).__name__} has no noise_model.sigma, so give noise_sigma")
        self.name = f"deepinv_{type(physics).__name__}"
        self.noise_sigma = check_noise(sigma)
        self.slope = RANGES[data_range]
        self.image_like = image_like
        self.linear = callable(getattr(physics, "A_adjoint", None))
        self._physics = physics
        self._placed = cache(self._placed_on)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        y = self._placed(x.device).A(self.slope * x + (1 - self.slope))
        if not isinstance(y, torch.Tensor) or y.is_complex():
            kind = str(y.dtype) if isinstance(y, torch.Tensor) else type(y).__name__
            raise ValueError(f"{self.name}: its measurement is {kind}, and only one real tensor can be used")
        return y

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        try:
            with torch.no_grad():
                return tuple(self(torch.zeros(1, *image_shape)).shape[1:])
        except RuntimeError as error:
            raise ValueError(f"{self.name}: cannot be applied to images of shape {image_shape}: {error}") from error

    def picture(self, y: torch.Tensor) -> torch.Tensor | None:
        return (y - (1 - self.slope)) / self.slope if self.image_like else None

    def objective(self, y: torch.Tensor) -> Objective:
        if not self.linear:
            return super().objective(y)
        physics = self._placed(y.device)

        def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                residual = self(x) - y
                return residual.square().flatten(1).sum(1), 2 * self.slope * physics.A_adjoint(residual)

        return evaluate

    def pseudo_inverse(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor | None:
        """``physics.A_dagger(y)`` where it has one."""
        physics = self._placed(y.device)
        if not callable(getattr(physics, "A_dagger", None)):
            return None
        with torch.no_grad():
            return (physics.A_dagger(y) - (1 - self.slope)) / self.slope

    def _placed_on(self, device: torch.device) -> Any:
        return deepcopy(self._physics).to(device) if hasattr(self._physics, "to") else self._physics


def from_physics(
    physics: Any,
    noise_sigma: float | None = None,
    data_range: str = "unit",
    image_like: bool = False,
    arguments: dict[str, Any] | None = None,
) -> PhysicsOperator:
    """A :class:`PhysicsOperator` for ``task.target=particledaps.operators.deepinv_adapter:from_physics``.

    ``+task.options.physics=my_physics:build`` names a function that returns ``deepinv.physics.Inpainting(...)`` or any
    other physics.

    Args:
        physics: an object, or ``package.module:factory`` that makes one.
        noise_sigma: see :class:`PhysicsOperator`.
        data_range: see :class:`PhysicsOperator`.
        image_like: see :class:`PhysicsOperator`.
        arguments: of the factory.

    Raises:
        ValueError: the factory cannot be imported, or see :class:`PhysicsOperator`.
    """
    if isinstance(physics, str):
        module, _, attribute = physics.partition(":")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"physics={physics}: cannot be imported as package.module:factory ({error})") from error
        physics = factory(**(arguments or {}))
    return PhysicsOperator(physics, noise_sigma, data_range, image_like)


def _noise_level(physics: Any) -> float | None:
    sigma = getattr(getattr(physics, "noise_model", None), "sigma", None)
    return None if sigma is None else float(torch.as_tensor(sigma).flatten()[0])
