"""The measured covariance of a run, kept in its folder: measuring takes seconds, and a resumed run goes on with it."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from particledaps.diffusion.covariance import CovarianceTable
from particledaps.files import replacing

COVARIANCE = "covariance.npz"
NAMES = ("weights", "sigmas", "matrices", "shape", "std")


def keep(table: CovarianceTable, path: Path, weights: str) -> None:
    """Write a covariance, with the checksum of the weights that it was measured on."""
    if path.exists():
        return
    values = (weights, list(table.sigmas), table.matrices.cpu().numpy(), table.image_shape, table.std)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **dict(zip(NAMES, map(np.array, values), strict=True)))


def read_kept(path: Path, weights: str, sigmas: Sequence[float], shape: tuple[int, int, int]) -> CovarianceTable | None:
    """The covariance of these weights at these noise levels; None where there is none, or it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in NAMES}
        whole = str(found["weights"]) == weights and found["sigmas"].tolist() == list(sigmas)
        if not whole or tuple(found["shape"].tolist()) != tuple(shape) or not np.isfinite(found["matrices"]).all():
            return None
        return CovarianceTable(list(sigmas), torch.from_numpy(found["matrices"]), shape, float(found["std"]))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
