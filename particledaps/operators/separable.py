"""Linear operators that act on rows and columns separately: ``A(x) = R x C^T`` per channel."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache

import torch

from particledaps.operators.interpolation import along_rows_and_columns
from particledaps.operators.operator import LinearOperator, image_shape_of


class SeparableOperator(LinearOperator):
    r"""Two small matrix products per channel, which also give the adjoint :math:`R^T y C`.

    Matrices are computed once for each (size, dtype, device).
    """

    def __init__(self) -> None:
        self._cached_matrix = cache(self._matrix_on)

    @abstractmethod
    def matrix(self, size: int, image_shape: tuple[int, int, int]) -> torch.Tensor:
        """The map of a row or column of ``size`` pixels of an image, ``(out, size)`` in float64."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return along_rows_and_columns(x, *self._matrices(x, image_shape_of(x)))

    def adjoint(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        rows, columns = self._matrices(y, image_shape)
        return along_rows_and_columns(y, rows.mT, columns.mT)

    def _matrices(self, like: torch.Tensor, image_shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        shape = tuple(image_shape)
        rows, columns = (self._cached_matrix(size, shape, like.dtype, like.device) for size in shape[1:])
        return rows, columns

    def _matrix_on(
        self, size: int, image_shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return self.matrix(size, image_shape).to(device, dtype)
