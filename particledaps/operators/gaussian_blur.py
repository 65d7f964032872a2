"""Gaussian blur."""

from __future__ import annotations

import math

import torch

from particledaps.operators.interpolation import filtering_matrix, gaussian_weights
from particledaps.operators.operator import check_noise, check_reference_side, pixels
from particledaps.operators.separable import SeparableOperator

TRUNCATE = 4.0


class GaussianBlur(SeparableOperator):
    """Correlation of images in [-1, 1] with a Gaussian, reflected about the edge pixels.

    The kernel ends at the smaller of four standard deviations and ``kernel_size``. (DAPS: 61 x 61 with standard
    deviation 3, so radius 12, noise 0.05.)

    Args:
        std: standard deviation of the kernel in pixels of an image of ``reference_side``.
        kernel_size: side of the kernel, odd, in the same pixels.
        reference_side: image side that lengths are given for; other images are blurred in proportion. None: lengths
            are pixels of the image at hand.
        noise_sigma: standard deviation of the noise (range of images: [-1, 1]).

    Raises:
        ValueError: a value is out of range.
    """

    name, image_like = "gaussian_blur", True

    def __init__(
        self,
        std: float = 3.0,
        kernel_size: int = 61,
        reference_side: int | None = 256,
        noise_sigma: float = 0.05,
    ) -> None:
        super().__init__()
        if not 0 < std < math.inf:
            raise ValueError(f"std={std}: must be positive and finite")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd and at least 1")
        self.std, self.kernel_size = float(std), kernel_size
        self.reference_side, self.noise_sigma = check_reference_side(reference_side), check_noise(noise_sigma)

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        if self._radius(image_shape) >= min(image_shape[1:]):
            raise ValueError(
                f"std={self.std:g}: the kernel's radius of {self._radius(image_shape)} px exceeds images of "
                f"{image_shape[1]}x{image_shape[2]} px"
            )
        return tuple(image_shape)

    def matrix(self, size: int, image_shape: tuple[int, int, int]) -> torch.Tensor:
        return filtering_matrix(size, gaussian_weights(self._std(image_shape), self._radius(image_shape)))

    def pseudo_inverse(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        """``y`` itself: undoing the kernel would amplify the noise without bound."""
        return y

    def _std(self, image_shape: tuple[int, int, int]) -> float:
        return pixels(self.std, image_shape, self.reference_side)

    def _radius(self, image_shape: tuple[int, int, int]) -> int:
        side = int(pixels(self.kernel_size, image_shape, self.reference_side))
        return min(int(TRUNCATE * self._std(image_shape) + 0.5), side // 2)
