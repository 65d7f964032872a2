"""Named images of one size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from particledaps.checks import DataError
from particledaps.data.sources import Source

if TYPE_CHECKING:  # its import takes seconds; checksums need none of it
    import torch


@dataclass(frozen=True)
class ImageSet:
    """Named images of one size, each read when it is needed.

    Attributes:
        ids: id of each image in its data set (its random streams hang on it), not its position here.
        names: one short name each, used in file names.
        origins: ``photograph``, ``synthetic`` (drawn from the prior) or ``data``.
        read: position -> ``(R, R, C)`` on the scale 0 to 255.
        source: position -> what it is read from.
        read_labels: see :meth:`labels`.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    origins: tuple[str, ...]
    read: Callable[[int], np.ndarray]
    source: Callable[[int], Source]
    read_labels: Callable[[], np.ndarray | None] = lambda: None

    def labels(self) -> np.ndarray | None:
        """Class of each image ``(N,)`` int64; None where the data have none.

        Raises:
            DataError: they are no whole numbers, one an image.
        """
        return self.read_labels()

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, position: int) -> torch.Tensor:
        """``(1, C, R, R)`` float32 in [-1, 1]."""
        return to_tensor(self.read(position)[None])

    @property
    def pixels(self) -> torch.Tensor:
        """All of them, ``(N, C, R, R)``."""
        import torch

        return torch.cat([self.image(position) for position in range(len(self))])


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """``(N, H, W, C)`` uint8 -> ``(N, C, H, W)`` float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def select_ids(ids: Iterable[int], start_id: int, end_id: int | None) -> list[int]:
    """Those of ``ids`` from ``start_id`` to ``end_id - 1``, in ascending order.

    Raises:
        DataError: the range leaves the data set.
    """
    known = sorted(ids)
    if not known:
        raise DataError("the data set holds no image")
    total = known[-1] + 1
    stop = total if end_id is None else end_id
    chosen = [i for i in known if start_id <= i < stop]
    if not 0 <= start_id < stop <= total or not chosen:
        raise DataError(
            f"data.start_id={start_id}, data.end_id={end_id}: the data set has ids {known[0]} to {total - 1} "
            f"(end_id is one past the last, at most {total})"
        )
    return chosen
