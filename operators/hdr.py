"""High dynamic range: recover an image from an overexposed one."""

import math

import torch

from operators.operator import Objective, Operator, check_noise


class HighDynamicRange(Operator):
    r"""``A(x) = clip(scale * x, -1, 1)`` on images in [-1, 1]: contrast raised, the ends of the range saturated.

    Saturated pixels have gradient 0. (DAPS: scale 2, noise 0.05.)

    Args:
        scale: gain, greater than 1.
        noise_sigma: standard deviation of the noise (range of images: [-1, 1]).

    Raises:
        ValueError: a value is out of range.
    """

    name, image_like = "hdr", True

    def __init__(self, scale: float = 2.0, noise_sigma: float = 0.05) -> None:
        if not 1 < scale < math.inf:
            raise ValueError(f"scale={scale}: must be greater than 1 and finite")
        self.scale, self.noise_sigma = float(scale), check_noise(noise_sigma)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return (self.scale * x).clamp(-1, 1)

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        return tuple(image_shape)

    def objective(self, y: torch.Tensor) -> Objective:
        def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            with torch.no_grad():
                exposed = self.scale * x
                residual = exposed.clamp(-1, 1) - y
                slope = torch.where(exposed.abs() <= 1, 2 * self.scale, 0.0)
                return residual.square().flatten(1).sum(1), slope * residual

        return evaluate

    def pseudo_inverse(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        """``clip(y, -1, 1) / scale``."""
        return y.clamp(-1, 1) / self.scale
