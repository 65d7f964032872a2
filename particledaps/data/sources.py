"""What a reconstruction was made from: the name of its input, and a checksum of its content."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np


class Source(NamedTuple):
    """One input.

    Attributes:
        name: in its data set, such as the path below ``data.dir``; the same in every run over that set.
        sha256: of its content.
    """

    name: str
    sha256: str


def arrays_sha256(*arrays: np.ndarray | None) -> str:
    """Of the types, shapes and values of arrays; None stands for one that is not there."""
    digest = hashlib.sha256()
    for array in arrays:
        if array is None:
            digest.update(b"none")
            continue
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
