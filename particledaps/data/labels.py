"""Classes of training images: ``train_labels`` of an ``.npz``, or the folders in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from particledaps.checks import DataError
from particledaps.data.npz import Archive


class Labels(NamedTuple):
    """Classes of images.

    Attributes:
        values: ``(N,)`` int64, from 0.
        names: of the classes.
    """

    values: np.ndarray
    names: tuple[str, ...]


def split_labels(path: Path, array: str, count: int) -> np.ndarray | None:
    """``train_labels`` or ``test_labels`` ``(count,)`` int64 of an ``.npz`` file; None if it has none.

    Raises:
        DataError: they are no whole numbers, one an image.
    """
    with Archive(path) as archive:
        if array not in archive.files:
            return None
        values = archive.read(array)
    if values.shape != (count,) or not np.issubdtype(values.dtype, np.integer):
        raise DataError(
            f"{path}: {array} is {values.dtype} {values.shape}: must be whole numbers, one for each of the {count} "
            "images"
        )
    return values.astype(np.int64)


def npz_labels(path: Path, count: int) -> Labels | None:
    """``train_labels`` of ``count`` images, with ``class_names`` where the file has them; None without labels.

    Raises:
        DataError: they are no classes from 0, one an image, or a class is left without images.
    """
    values = split_labels(path, "train_labels", count)
    if values is None:
        return None
    with Archive(path) as archive:
        names = archive.read("class_names") if "class_names" in archive.files else None
    present = np.unique(values)
    if present[0] < 0 or len(present) != present[-1] + 1:
        missing = sorted(set(range(int(present[-1]) + 1)) - set(present.tolist()))
        what = f"class {missing[0]} has no images" if present[0] >= 0 else f"class {present[0]} is negative"
        raise DataError(f"{path}: train_labels: {what}: classes must be 0, 1, 2, ... and each must have images")
    if names is None:
        return Labels(values, tuple(str(c) for c in present))
    if len(names) != len(present):
        raise DataError(f"{path}: class_names has {len(names)} names for {len(present)} classes in train_labels")
    return Labels(values, tuple(map(str, names)))


def folder_labels(folder: Path, files: Sequence[Path]) -> Labels | None:
    """The first folder below ``folder`` that each file lies in, in alphabetical order; None if one lies in none."""
    below = [file.relative_to(folder).parts for file in files]
    if any(len(parts) < 2 for parts in below):
        return None
    names = sorted({parts[0] for parts in below})
    return Labels(np.array([names.index(parts[0]) for parts in below], dtype=np.int64), tuple(names))
