"""The array ``mask`` beside ``y``: which of its entries were measured."""

from __future__ import annotations

import numpy as np

from particledaps.checks import DataError
from particledaps.data.npz import Archive

MASK = "mask"


def gaps(archive: Archive, shape: tuple[int, ...], rows: list[int], count: int) -> np.ndarray:
    """True where an entry of ``y`` was not measured, for the chosen rows; broadcasts to ``(len(rows), *shape)``.

    Args:
        archive: with the array ``mask``, 1 = measured and 0 = not, of the shape of one measurement or of a plane
            ``(H, W)`` of it: one for all measurements, or one each.
        shape: of one measurement.
        rows: which measurements, ascending.
        count: how many there are.

    Raises:
        DataError: it has another shape, or values other than 0 and 1.
    """
    (found, dtype), path = archive.header(MASK), archive.path
    fitting = {shape, shape[-2:], (1,) * (len(shape) - 2) + shape[-2:]}
    for_all = found in fitting or (found[:1] == (1,) and found[1:] in fitting)
    for_each = found[:1] == (count,) and found[1:] in fitting
    if dtype.kind not in "biuf" or not (for_all or for_each):
        raise DataError(f"{path}: mask is {dtype} {found}, expected 0 and 1 (1 = measured) {_wanted(shape, count)}")
    if for_all and for_each and count > 1:
        raise DataError(
            f"{path}: mask {found} can be one for each channel or one for each measurement: save it as "
            f"{(1, *found)} or as {(count, 1, *shape[-2:])}"
        )
    mask = archive.read(MASK, rows if for_each else None)
    if not np.isin(mask, (0, 1)).all():
        held = f"{np.nanmin(mask):g} to {np.nanmax(mask):g}" if np.isfinite(mask).any() else "NaN"
        raise DataError(f"{path}: mask holds other values than 0 and 1 ({held}): 1 = measured, 0 = not")
    own = found[1:] if for_each or found not in fitting else found
    return (mask == 0).reshape(-1, *(1,) * (len(shape) - len(own)), *own)


def _wanted(shape: tuple[int, ...], count: int) -> str:
    plane = f"{shape[-2:]}, " if len(shape) > 2 else ""
    return f"of the shape {plane}{shape} or one for each of the {count} measurements"
