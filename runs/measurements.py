"""Measurements from a file: read, brought to this project's convention, and held against what an image can cause."""

from pathlib import Path

import numpy as np
import torch

from operators import magnitudes
from operators.magnitudes import CONVENTIONS, Convention, Doubt
from operators.operator import Operator
from runs.checks import DataError
from runs.npz import Archive
from runs.settings import TaskSettings

FORM, ORIGIN = "measurement", "origin"
"""Arrays with which a file says its own convention; what a run saves has them."""


def load_measurements(
    path: Path, shape: tuple[int, ...], start_id: int = 0, end_id: int | None = None
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Measurements ``y`` ``(N, ...)`` and their image ids from an ``.npz`` (``y``, optional ``image_ids``).

    Only the chosen rows are read.

    Args:
        path: the file.
        shape: shape of one measurement.
        start_id: ids below it are left out.
        end_id: ids from it on are left out, unless None.

    Raises:
        DataError: the file, an array or the ids do not fit.
    """
    with Archive(path) as archive:
        found, dtype = archive.header("y")
        if dtype.kind not in "fiu" or found[1:] != tuple(shape) or not found:
            raise DataError(f"{path}: y is {dtype} {found}, expected real numbers (N, {', '.join(map(str, shape))})")
        ids = _image_ids(archive, found[0])
        chosen = (ids >= start_id) & (ids < end_id if end_id is not None else True)
        if not chosen.any():
            raise DataError(f"data.start_id={start_id}, data.end_id={end_id}: {path} has the ids {ids.tolist()[:20]}")
        with np.errstate(over="ignore"):
            y = archive.read("y", np.flatnonzero(chosen).tolist()).astype(np.float32)
    if not np.isfinite(y).all():
        raise DataError(f"{path}: y holds NaN or infinite values")
    return torch.from_numpy(y), tuple(ids[chosen].tolist())


def _image_ids(archive: Archive, count: int) -> np.ndarray:
    if "image_ids" not in archive.files:
        return np.arange(count)
    shape, dtype = archive.header("image_ids")
    ids = archive.read("image_ids") if shape == (count,) and dtype.kind in "iu" else None
    if ids is None or len(np.unique(ids)) < len(ids) or (ids < 0).any():
        raise DataError(f"{archive.path}: image_ids must be {count} distinct whole numbers from 0, one a measurement")
    return ids


def file_convention(path: Path, task: TaskSettings) -> Convention:
    """The convention of a file's magnitudes: what it says of itself, else ``task.measurement`` and ``task.origin``.

    Raises:
        DataError: the file and the configuration contradict each other.
    """
    asked = Convention(task.measurement, task.origin)
    with Archive(path) as archive:
        if FORM not in archive.files or ORIGIN not in archive.files:
            return asked
        own = Convention(*(str(archive.read(name)) for name in (FORM, ORIGIN)))
    if own not in CONVENTIONS:
        raise DataError(f"{path}: measurement={own.measurement}, origin={own.origin}: unknown convention")
    if asked not in (own, Convention()):
        raise DataError(f"{path} says that it holds {own}, the configuration says {asked}: leave task.* out")
    return own


def centred_amplitudes(
    y: torch.Tensor, image_id: int, convention: Convention, image_shape: tuple[int, int, int], task: TaskSettings
) -> torch.Tensor:
    """Given magnitudes ``(C, H, W)`` of one image as the operator takes them.

    Raises:
        DataError: no image in [0, 1] can have them; with the convention that they look like.
    """
    found = magnitudes.doubt(y, image_shape, task.noise_sigma, convention)
    if found is not None:
        raise DataError(f"data.measurement, image {image_id}: {explain(found, convention, y.shape[-2:])}")
    return magnitudes.to_centred_amplitude(y, convention)


def explain(doubt: Doubt, given: Convention, size: tuple[int, int]) -> str:
    """Why magnitudes are impossible, what they look like, and how to convert them."""
    b = doubt.bounds
    why = (
        f"no image in [0, 1] has these Fourier magnitudes as {given} (channel {doubt.channel}: {b.at_zero:.4g} at "
        f"frequency 0, at most {b.largest:.4g} anywhere, sum of squares {b.power:.4g})"
    )
    if doubt.looks_like is None:
        return (
            f"{why}; they fit no known convention: y must hold |fftshift(fft2(x, norm='ortho'))| of the zero-padded "
            f"image x in [0, 1], {size[0]}x{size[1]} entries a channel"
        )
    remedies = _remedies(doubt, given)
    looks = "they look like " + (f"{doubt.looks_like}" if doubt.looks_like != given else "another scale")
    return f"{why}; {looks}: {', and '.join(remedies)}"


def _remedies(doubt: Doubt, given: Convention) -> list[str]:
    seen, remedies = doubt.looks_like, []
    if seen.measurement != given.measurement:
        way = "y = sqrt(y)" if seen.measurement == "intensity" else "y is no square"
        remedies.append(f"set task.measurement={seen.measurement} ({way})")
    if seen.origin != given.origin:
        way = "fftshift" if seen.origin == "corner" else "ifftshift"
        remedies.append(f"set task.origin={seen.origin} (or save np.fft.{way}(y, axes=(-2, -1)))")
    if doubt.largest_scale is not None:
        power = 2 if seen.measurement == "intensity" else 1
        factor = f"multiply y by {doubt.largest_scale**power:.4g} or less"
        if doubt.usual is not None:
            factor += f" ({doubt.usual[0] ** power:.4g}, or a division by {doubt.usual[0] ** -power:.4g}, if "
            factor += f"{doubt.usual[1]})"
        remedies.append(factor)
    return remedies


def check_magnitude(operator: Operator, y: torch.Tensor, image_id: int, image_shape: tuple[int, int, int]) -> None:
    """A measurement ``(1, ...)`` whose loss cannot even be computed is refused.

    Raises:
        DataError: its values are too large.
    """
    grey = torch.zeros(1, *image_shape, device=y.device)
    if not (operator.loss(grey, y).isfinite().all() and operator.noise_floor(y).mean.isfinite().all()):
        raise DataError(
            f"data.measurement, image {image_id}: values up to {y.abs().max().item():.3g} give no finite loss; y must "
            f"have the scale of {operator.name} of an image in [-1, 1]"
        )
