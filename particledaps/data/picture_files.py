"""Pictures from files, as arrays on the scale 0 to 255.

Grey, RGBA, 16-bit, EXIF-rotated and non-square files are converted: transparency is laid on white,
16-bit is scaled to 8-bit range as float, the centre square is cut and resized (Lanczos).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from particledaps.checks import DataError
from particledaps.data.pixel_values import PixelError, deep_planes, fit_planes
from particledaps.data.upright import upright

DAMAGED_IMAGE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def to_unit_float(image: Image.Image) -> Image.Image:
    """Undo EXIF rotation and transparency of a picture with at most 8 bits: an 8-bit ``L`` or ``RGB`` image."""
    image = upright(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "L" else image.convert("RGB")


def load_image(path: Path, resolution: int, channels: int = 3, bit_depth: int | None = None) -> np.ndarray:
    """Read one file as a ``(resolution, resolution, channels)`` array on the scale 0 to 255.

    Args:
        path: the file.
        resolution: side in pixels.
        channels: 1 or 3.
        bit_depth: bits of integers in files with more than 8, over what the file says of itself.

    Returns:
        uint8, or float32 for a picture with more than 8 bits or of floats: it keeps its precision.

    Raises:
        DataError: the file is no readable image, its shorter side is below ``resolution // 2``, or its numbers are no
            grey levels (see :func:`particledaps.data.pixel_values.deep_planes`).
    """
    try:
        with Image.open(path) as opened:
            opened.filename = ""  # else Pillow maps a turned TIFF into memory with its sides swapped
            deep = deep_planes(opened, path, bit_depth)
            planes = [to_unit_float(opened)] if deep is None else deep
    except PixelError as error:
        raise DataError(f"{path}: {error}") from error
    except DAMAGED_IMAGE as error:
        raise DataError(f"{path} is not a readable image: {error}") from error
    width, height = planes[0].size
    if min(width, height) < resolution // 2:
        raise DataError(
            f"{path} is {width}x{height} px: too small for a {resolution} px prior "
            f"(at least {resolution // 2} px on the shorter side)"
        )
    if deep is not None:
        return fit_planes(deep, resolution, channels)
    image = planes[0].convert("L" if channels == 1 else "RGB")
    square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(resolution, resolution, channels)


def is_grey(path: Path) -> bool:
    """Does a picture say that it holds grey levels only? A damaged one is left to :func:`load_image`."""
    try:
        with Image.open(path) as opened:
            return opened.getbands() in (("1",), ("L",), ("I",), ("F",), ("L", "A")) or opened.mode.startswith("I;16")
    except DAMAGED_IMAGE:
        return True
