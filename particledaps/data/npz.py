"""``.npz`` archives from anywhere: nothing is unpickled, and no more is read than is asked for."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from particledaps.checks import DataError

DAMAGED = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MEMORY_SHARE = 0.5
BLOCK = 2**24


class Archive:
    """An open ``.npz``: a context manager.

    Args:
        path: the file.

    Raises:
        DataError: the file is missing or is not an ``.npz`` archive.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise DataError(f"{path} does not exist")
        try:
            self._zip = zipfile.ZipFile(path)
        except DAMAGED as error:
            raise DataError(_what_else(path) or f"{path} is not a readable .npz file: {error}") from error
        self.files = [n.removesuffix(".npy") for n in self._zip.namelist() if n.endswith(".npy")]
        if not self.files:
            raise DataError(f"{path} is not an .npz archive: it holds no array")

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._zip.close()

    def header(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of an array, without reading it.

        Raises:
            DataError: there is no such array, or it is damaged.
        """
        with self._open(key) as file:
            shape, _, dtype = self._header(key, file)
        return shape, dtype

    def read(self, key: str, rows: Sequence[int] | None = None) -> np.ndarray:
        """An array, or the rows of it that are given in ascending order; the others are passed over.

        Raises:
            DataError: there is no such array, it is damaged, or it does not fit into memory.
        """
        with self._open(key) as file:
            shape, fortran, dtype = self._header(key, file)
            whole = rows is None or fortran or not shape
            wanted = range(math.prod(shape[:1])) if whole else rows
            row_bytes = math.prod(shape[1:]) * dtype.itemsize
            self._check_memory(key, len(wanted) * row_bytes)
            try:
                found = _read_rows(file, wanted, row_bytes)
            except DAMAGED as error:
                raise DataError(f"{self.path}: array '{key}' is damaged: {error}") from error
        if not whole:
            return found.view(dtype).reshape(len(wanted), *shape[1:])
        array = found.view(dtype).reshape(shape[::-1]).T if fortran else found.view(dtype).reshape(shape)
        return array if rows is None else array[list(rows)]

    def _open(self, key: str) -> IO[bytes]:
        if key not in self.files:
            raise DataError(f"{self.path} has no array '{key}' (it holds {', '.join(self.files[:20])})")
        try:
            return self._zip.open(f"{key}.npy")
        except DAMAGED as error:
            raise DataError(f"{self.path}: array '{key}' is damaged: {error}") from error

    def _header(self, key: str, file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
        """Shape, order and type; they must agree with how much the archive says it holds."""
        try:
            shape, fortran, dtype = HEADERS[np.lib.format.read_magic(file)](file)
        except (*DAMAGED, KeyError) as error:
            raise DataError(f"{self.path}: array '{key}' is damaged: {error}") from error
        if dtype.hasobject:
            raise DataError(f"{self.path}: array '{key}' holds Python objects, which are not read; save plain numbers")
        announced, held = math.prod(shape) * dtype.itemsize, self._bytes_of(key) - file.tell()
        if announced != held or min(shape, default=0) < 0:
            raise DataError(
                f"{self.path}: array '{key}' is damaged: its header says {dtype} {shape}, {announced:,} bytes, but it "
                f"holds {held:,}"
            )
        return shape, fortran, dtype

    def _bytes_of(self, key: str) -> int:
        """How long the file of an array is, its header included."""
        return self._zip.getinfo(f"{key}.npy").file_size

    def _check_memory(self, key: str, needed: int) -> None:
        room = int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        if needed > room:
            raise DataError(
                f"{self.path}: array '{key}' takes {needed / 1e9:.1f} GB in memory, more than half of what this "
                f"machine has ({room / 1e9:.1f} GB): split the file"
            )


class SingleArray(Archive):
    """One array in a file of its own, ``.npy``, as an archive that holds nothing but ``y``.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, ["y"]

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        pass

    def _open(self, key: str) -> IO[bytes]:
        if key not in self.files:
            raise DataError(f"{self.path} has no array '{key}': an .npy file holds y alone, np.savez saves both")
        try:
            return self.path.open("rb")
        except OSError as error:
            raise DataError(f"{self.path} is not a readable .npy file: {error}") from error

    def _bytes_of(self, key: str) -> int:
        return self.path.stat().st_size


def _what_else(path: Path) -> str | None:
    """What a file is that is no zip archive, where that is known."""
    with path.open("rb") as file:
        if file.read(6) == np.lib.format.MAGIC_PREFIX:
            return f"{path} is not an .npz archive but one array: np.savez('y.npz', y=np.load('{path}')) makes one"
    return None


def _read_rows(file: IO[bytes], rows: Sequence[int], row_bytes: int) -> np.ndarray:
    """The bytes of ascending rows of a stream that stands at row 0, ``(len(rows) * row_bytes,)`` uint8."""
    found = np.empty(len(rows) * row_bytes, np.uint8)
    position = first = 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and rows[last] == rows[last - 1] + 1:  # neighbours are read at once
            last += 1
        file.seek((rows[first] - position) * row_bytes, os.SEEK_CUR)
        _fill(file, memoryview(found)[first * row_bytes : last * row_bytes])
        position, first = rows[last - 1] + 1, last
    return found


def _fill(file: IO[bytes], target: memoryview) -> None:
    done = 0
    while done < len(target):
        count = file.readinto(target[done : done + BLOCK])
        if not count:
            raise EOFError(f"{len(target) - done} bytes are missing")
        done += count
