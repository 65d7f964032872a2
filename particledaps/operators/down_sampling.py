"""Bicubic down-sampling (super-resolution)."""

from __future__ import annotations

import math

import torch

from particledaps.operators.interpolation import along_rows_and_columns, cubic, shrinking_matrix
from particledaps.operators.operator import check_noise
from particledaps.operators.separable import SeparableOperator


class DownSampling(SeparableOperator):
    r"""Antialiased bicubic reduction of images in [-1, 1], as MATLAB's ``imresize`` (Keys's kernel, a = -1/2).

    The kernel is stretched by the factor, weights sum to 1, the boundary mirrors the edge pixel too; sides become
    ``ceil(side / scale_factor)``. (DAPS: factor 4, noise 0.05.)

    Args:
        scale_factor: reduction of each side, at least 2.
        noise_sigma: standard deviation of the noise (range of images: [-1, 1]).

    Raises:
        ValueError: a value is out of range.
    """

    name, image_like = "down_sampling", True

    def __init__(self, scale_factor: int = 4, noise_sigma: float = 0.05) -> None:
        super().__init__()
        if scale_factor < 2:
            raise ValueError(f"scale_factor={scale_factor}: must be at least 2")
        self.scale_factor, self.noise_sigma = scale_factor, check_noise(noise_sigma)

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        channels, height, width = image_shape
        if self.scale_factor > min(height, width):
            raise ValueError(f"scale_factor={self.scale_factor}: exceeds the image side {min(height, width)}")
        return channels, math.ceil(height / self.scale_factor), math.ceil(width / self.scale_factor)

    def matrix(self, size: int, image_shape: tuple[int, int, int]) -> torch.Tensor:
        return shrinking_matrix(size, self.scale_factor, cubic, reach=2)

    def pseudo_inverse(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        """:math:`A^+ y`: the smallest image with this measurement."""
        rows, columns = (torch.linalg.pinv(self.matrix(side, image_shape)).to(y) for side in image_shape[1:])
        return along_rows_and_columns(y, rows, columns)
