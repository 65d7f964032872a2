"""Measurements from a file: read, brought to this project's convention, and held against what an image can cause.

What was not measured is NaN from here to :func:`particledaps.operators.measured.leave_out`, whether the file says so by
NaN or by ``mask``; so it moves along with ``y`` when an origin is shifted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from particledaps.checks import DataError
from particledaps.data.given_arrays import open_arrays
from particledaps.data.masks import MASK, gaps
from particledaps.names import shown
from particledaps.operators import magnitudes
from particledaps.operators.magnitudes import CONVENTIONS, Convention, Doubt

if TYPE_CHECKING:
    from particledaps.data.npz import Archive
    from particledaps.operators.operator import Operator
    from particledaps.settings.schema import TaskSettings

FORM, ORIGIN = "measurement", "origin"
"""Arrays with which a file says its own convention; what a run saves has them."""
SYMMETRISED = 1e-5
"""Noise of so little of the measurement is rounding."""
SAVED = ("estimates", "truth", "particle_ids", FORM, ORIGIN)
"""Further arrays of the files that a run saves."""


def load_measurements(
    path: Path, shape: tuple[int, ...], start_id: int = 0, end_id: int | None = None, part_name: str | None = None
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Measurements ``y`` ``(N, ...)``, NaN where nothing was measured, and their image ids.

    The file is an ``.npz`` with ``y`` and, if it has them, ``image_ids`` and ``mask``, or an ``.npy``; a single
    measurement may lack its first axis. Only the chosen rows are read.

    Args:
        path: the file.
        shape: shape of one measurement.
        start_id: ids below it are left out.
        end_id: ids from it on are left out, unless None.
        part_name: a random part of the operator; if that is ``mask``, it tells pixels, not entries of ``y``.

    Raises:
        DataError: the file, an array or the ids do not fit.
    """
    with open_arrays(path, shape) as archive:
        count = _count(archive, shape)
        ids = _image_ids(archive, count)
        chosen = (ids >= start_id) & (ids < end_id if end_id is not None else True)
        if not chosen.any():
            raise DataError(f"data.start_id={start_id}, data.end_id={end_id}: {path} has the ids {ids.tolist()[:20]}")
        rows, single = np.flatnonzero(chosen).tolist(), len(archive.header("y")[0]) == len(shape)
        with np.errstate(over="ignore"):
            y = archive.read("y", None if single else rows).reshape(len(rows), *shape).astype(np.float32)
        if MASK in archive.files and part_name != MASK:
            y = np.where(gaps(archive, shape, rows, count), np.float32(np.nan), y)
    return torch.from_numpy(y), tuple(ids[chosen].tolist())


def _count(archive: Archive, shape: tuple[int, ...]) -> int:
    """How many measurements of this shape ``y`` holds."""
    found, dtype = archive.header("y")
    if dtype.kind in "fiu" and found == tuple(shape):
        return 1
    if dtype.kind in "fiu" and found[1:] == tuple(shape) and found:
        return found[0]
    wanted = f"expected real numbers (N, {', '.join(map(str, shape))}), or one measurement without the N"
    advice = "; magnitudes of complex numbers are np.abs(y)" if dtype.kind == "c" else ""
    raise DataError(f"{archive.path}: y is {dtype} {found}, {wanted}{advice}")


def check_entries(path: Path, image_id: int, y: torch.Tensor) -> None:
    """One measurement holds numbers, and NaN where it was not measured.

    Raises:
        DataError: it holds infinite values, or nothing was measured.
    """
    if y.isinf().any():
        raise DataError(
            f"{path}, image {image_id}: y holds infinite values (in float32); of NaN or infinite values only NaN is "
            "read, as not measured"
        )
    if y.isnan().all():
        raise DataError(
            f"{path}, image {image_id}: nothing is measured: every entry of y is NaN or infinite, or 0 in mask "
            "(1 = measured, 0 = not)"
        )


def gaps_told(path: Path, left_out: Sequence[int], entries: int, part_name: str | None) -> list[str]:
    """A sentence about entries that are left out, if any are.

    Args:
        path: the file.
        left_out: how many entries of each measurement are not measured.
        entries: of all these measurements.
        part_name: the operator's random part.
    """
    total, some = sum(left_out), sum(n > 0 for n in left_out)
    if total == 0:
        return []
    how = "NaN" if part_name == MASK else "NaN, or 0 in mask"
    share = f"{total:,} of {entries:,} entries of y ({total / entries:.1%}, in {some} of {len(left_out)} measurements)"
    return [f"{shown(path.name)}: {share} are not measured ({how}) and are left out"]


def unread_arrays(path: Path, shape: tuple[int, ...], part_name: str | None) -> list[str]:
    """A sentence about the arrays of a file that nobody reads, if there are any.

    Args:
        path: the file.
        shape: of one measurement.
        part_name: the operator's random part, read too.
    """
    known = list(dict.fromkeys(["y", "image_ids", MASK, *filter(None, [part_name]), *SAVED]))
    with open_arrays(path, shape) as archive:
        others = [shown(name) for name in archive.files if name not in known]
    if not others:
        return []
    named = f"array {others[0]} is" if len(others) == 1 else f"arrays {', '.join(others[:20])} are"
    return [f"{shown(path.name)}: {named} not read (known: {', '.join(known)})"]


def _image_ids(archive: Archive, count: int) -> np.ndarray:
    if "image_ids" not in archive.files:
        return np.arange(count)
    shape, dtype = archive.header("image_ids")
    ids = archive.read("image_ids") if shape == (count,) and dtype.kind in "iu" else None
    if ids is None or len(np.unique(ids)) < len(ids) or (ids < 0).any():
        raise DataError(f"{archive.path}: image_ids must be {count} distinct whole numbers from 0, one a measurement")
    return ids


def file_convention(path: Path, shape: tuple[int, ...], task: TaskSettings) -> Convention:
    """The convention of a file's magnitudes: what it says of itself, else ``task.measurement`` and ``task.origin``.

    Args:
        path: the file.
        shape: of one measurement.
        task: what the configuration says.

    Raises:
        DataError: the file and the configuration contradict each other.
    """
    asked = Convention(task.measurement, task.origin)
    with open_arrays(path, shape) as archive:
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
    """Given magnitudes ``(C, H, W)`` of one image, NaN where not measured, in the operator's convention.

    Raises:
        DataError: no image in [0, 1] can have them; with the convention that they look like.
    """
    sigma = 0.0 if isinstance(task.noise_sigma, str) else task.noise_sigma  # auto: what the pairs show
    found = magnitudes.doubt(y, image_shape, sigma, convention)
    if found is not None:
        raise DataError(f"data.measurement, image {image_id}: {explain(found, convention, y.shape[-2:])}")
    return magnitudes.to_centred_amplitude(y, convention)


def with_its_noise(operator: Operator, y: torch.Tensor) -> tuple[Operator, str]:
    """The operator with the noise level that its measurement ``y`` ``(1, ...)`` shows (``task.noise_sigma=auto``).

    Returns:
        The operator, and ``shown``; or as it was, and ``silent`` where nothing in y shows its noise, ``symmetrised``
        where conjugate entries are equal to rounding, so that half of them tell nothing.
    """
    found = operator.estimated_noise_sigma(y)
    if found is None:
        return operator, "silent"
    if found.item() <= SYMMETRISED * y.square().mean().sqrt().item():
        return operator, "symmetrised"
    return operator.with_noise(found.item()), "shown"


def explain(doubt: Doubt, given: Convention, size: tuple[int, int]) -> str:
    """Why magnitudes are impossible, what they look like, and how to convert them."""
    b = doubt.bounds
    at_zero = "nothing measured" if b.at_zero != b.at_zero else f"{b.at_zero:.4g}"
    why = (
        f"no image in [0, 1] has these Fourier magnitudes as {given} (channel {doubt.channel}: {at_zero} at "
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
