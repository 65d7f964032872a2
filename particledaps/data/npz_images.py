"""Images and their splits in an ``.npz`` file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from particledaps.checks import DataError
from particledaps.data.image_set import ImageSet, select_ids
from particledaps.data.labels import split_labels
from particledaps.data.npz import Archive
from particledaps.data.sources import Source, arrays_sha256

if TYPE_CHECKING:
    from particledaps.settings.schema import DataSettings

NUM_VALIDATION_GROUPS = 150
BLOCK = 256
"""Rows of an archive that are read at once."""


def validation_indices(groups: np.ndarray, num_groups: int = NUM_VALIDATION_GROUPS) -> np.ndarray:
    """Indices of ``num_groups`` whole near-duplicate groups, always the same ones.

    Args:
        groups: ``(N,)`` group id of each training image.
        num_groups: how many groups are held out.
    """
    chosen = np.random.default_rng(0).permutation(np.unique(groups))[:num_groups]
    return np.flatnonzero(np.isin(groups, chosen))


def npz_training(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """``train_images`` ``(N, H, W, C)`` of an ``.npz`` file and the indices held out as validation.

    Near-duplicate groups (``train_dupgroup``) stay whole; without them every image is its own group.
    """
    with Archive(path) as archive:
        held_out = _held_out(archive, _num_images(archive, "train_images"))
        return _with_channels(archive.read("train_images")), held_out


def npz_split(path: Path, split: str) -> np.ndarray:
    """Images ``(N, H, W, C)`` uint8 of split ``test``, ``validation`` or ``train`` of an ``.npz`` file."""
    with Archive(path) as archive:
        name, rows = _split_rows(archive, split)
        return _with_channels(archive.read(name, rows))


def _split_rows(archive: Archive, split: str) -> tuple[str, list[int]]:
    """The array that holds a split, and the rows of it."""
    name = _split_array(split)
    count = _num_images(archive, name)
    if split == "test":
        return name, list(range(count))
    held_out = _held_out(archive, count)
    chosen = held_out if split == "validation" else np.delete(np.arange(count), held_out)
    return name, chosen.tolist()


def _split_array(split: str) -> str:
    return "test_images" if split == "test" else "train_images"


def _held_out(archive: Archive, count: int) -> np.ndarray:
    if "train_dupgroup" not in archive.files:
        return validation_indices(np.arange(count))
    shape, _ = archive.header("train_dupgroup")
    if shape != (count,):
        raise DataError(f"{archive.path}: train_dupgroup has shape {shape}, expected ({count},)")
    return validation_indices(archive.read("train_dupgroup"))


def _num_images(archive: Archive, name: str) -> int:
    shape, dtype = archive.header(name)
    if dtype != np.uint8 or len(shape) not in (3, 4):
        raise DataError(f"{archive.path}: images must be uint8 (N, H, W[, C]), not {dtype} {shape}")
    return shape[0]


def _with_channels(images: np.ndarray) -> np.ndarray:
    return images if images.ndim == 4 else images[..., None]


class _Rows:
    """Rows of an array of an archive, read in blocks: a compressed one is unfolded from its start every time."""

    def __init__(self, path: Path, name: str, rows: Sequence[int]) -> None:
        self.path = path
        self.name = name
        self.rows = rows
        self.first, self.block = 0, np.empty((0,))

    def __call__(self, position: int) -> np.ndarray:
        if not self.first <= position < self.first + len(self.block):
            with Archive(self.path) as archive:
                block = archive.read(self.name, self.rows[position : position + BLOCK])
            self.first, self.block = position, _with_channels(block)
        return self.block[position - self.first]


def npz_images(data: DataSettings, shape: tuple[int, ...]) -> ImageSet:
    """Only the images that are asked for are read."""
    path = Path(data.path)
    with Archive(path) as archive:
        size = archive.header(_split_array(data.split))[0][1:]
    found = (*(size[2:] or (1,)), *size[:2])
    if found != tuple(shape):
        raise DataError(f"{path} holds images of shape {found}, the prior needs {shape}")
    return npz_rows(data)


def npz_rows(data: DataSettings) -> ImageSet:
    """The images of an ``.npz`` that are asked for, of whatever size.

    Raises:
        DataError: they are not there.
    """
    path = Path(data.path)
    with Archive(path) as archive:
        array, rows = _split_rows(archive, data.split)
    chosen = select_ids(range(len(rows)), data.start_id, data.end_id)
    read, names = _Rows(path, array, [rows[i] for i in chosen]), tuple(f"{data.split}_{i:05d}" for i in chosen)

    def source(position: int) -> Source:
        return Source(names[position], arrays_sha256(read(position)))

    def labels() -> np.ndarray | None:
        with Archive(path) as archive:
            count = _num_images(archive, array)
        values = split_labels(path, array.replace("images", "labels"), count)
        return None if values is None else values[[rows[i] for i in chosen]]

    return ImageSet(tuple(chosen), names, ("data",) * len(chosen), read, source, labels)
