"""High dynamic range: recover an image from an overexposed one."""

from __future__ import annotations

import math

import torch

from particledaps.operators.operator import Objective, Operator, check_noise


class HighDynamicRange(Operator):
    r"""``A(x) = clip(scale * x, -1, 1)`` on images in [-1, 1]: contrast raised, the ends of the range saturated.

    (DAPS: scale 2, noise 0.05.) Where an estimate saturates, the loss has gradient 0, and a pixel that saturates by
    mistake is held there by nothing but the prior.

    Args:
        scale: gain, greater than 1.
        noise_sigma: standard deviation of the noise (range of images: [-1, 1]).
        recover_saturated: call such pixels back: where y is not saturated (:math:`|y| < 1 - 3 \sigma_n`), the gradient
            is that of the unclipped :math:`(scale \cdot x - y)^2`, which agrees with the loss wherever the estimate is
            not saturated and points inwards where it is.

    Raises:
        ValueError: a value is out of range.
    """

    name, image_like = "hdr", True

    def __init__(self, scale: float = 2.0, noise_sigma: float = 0.05, recover_saturated: bool = False) -> None:
        if not 1 < scale < math.inf:
            raise ValueError(f"scale={scale}: must be greater than 1 and finite")
        self.scale, self.noise_sigma = float(scale), check_noise(noise_sigma)
        self.recover_saturated = recover_saturated

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (self.scale * x).clamp(-1, 1)

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        return tuple(image_shape)

    def objective(self, y: torch.Tensor) -> Objective:
        recover = (
            y.abs() < 1 - 3 * self.noise_sigma if self.recover_saturated else torch.zeros_like(y, dtype=torch.bool)
        )

        def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                exposed = self.scale * x
                loss = (exposed.clamp(-1, 1) - y).square().flatten(1).sum(1)
                return loss, torch.where((exposed.abs() <= 1) | recover, 2 * self.scale * (exposed - y), 0.0)

        return evaluate

    def pseudo_inverse(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        """``clip(y, -1, 1) / scale``."""
        return y.clamp(-1, 1) / self.scale
