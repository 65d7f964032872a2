"""Pictures with more than 8 bits a sample: which stored number is white, and all of their precision.

Pillow reduces 16-bit colour to its high byte and knows no white. Here the file's own words are read (PNG ``sBIT``,
TIFF ``BitsPerSample`` and ``MaxSampleValue``); a range that they leave open is refused rather than guessed.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from particledaps.data.upright import read_orientation, upright

BITS = 258
PHOTOMETRIC = 262
EXTRA = 338
SAMPLE_FORMAT = 339
MAX_SAMPLE_VALUES = (281, 341)
DARK = 2**14
"""16-bit samples that stay below it are probably 8, 10, 12 or 14 bits stored in 16."""
ROUNDING = 1e-6
LUMINANCE = (0.299, 0.587, 0.114)
"""ITU-R BT.601, as Pillow's conversion to grey."""


class PixelError(Exception):
    """The numbers in a picture are no grey levels; the message says which were found and what to do."""


def deep_planes(image: Image.Image, path: Path, bit_depth: int | None = None) -> list[Image.Image] | None:
    """The one or three channels of a picture with more than 8 bits a sample, as float images on the scale 0 to 255.

    Floats are taken as grey levels in [0, 1], integers as ``value / (2**bits - 1)``. EXIF rotation is undone and
    transparency laid on white.

    Args:
        image: the file, opened and not yet loaded.
        path: the file.
        bit_depth: bits of the integers (``data.bit_depth``), over what the file says; floats have none.

    Returns:
        Images of mode ``F``, one if grey; None if the picture has at most 8 bits.

    Raises:
        PixelError: a value is not finite, negative or above white, or nothing says which number is white.
    """
    stored, significant = _png_header(path) if image.format == "PNG" else (_stored_bits(image), None)
    if stored <= 8:
        return None
    samples = _samples(image, path)
    if samples.dtype.kind == "f":
        unit = _unit_floats(samples)
    else:
        unit = samples / _white(samples, image, stored, significant, bit_depth)
    if _tags(image).get(PHOTOMETRIC) == 0:  # WhiteIsZero
        unit = 1 - unit
    colour = _on_white(unit, samples, image)
    return [Image.fromarray((255 * colour[..., c]).astype(np.float32)) for c in range(colour.shape[-1])]


def fit_planes(planes: list[Image.Image], resolution: int, channels: int) -> np.ndarray:
    """Cut the centre square and resize it (Lanczos): ``(resolution, resolution, channels)`` float32 in [0, 255]."""
    if channels == 1 and len(planes) == 3:
        grey = sum(weight * np.asarray(plane) for weight, plane in zip(LUMINANCE, planes, strict=True))
        planes = [Image.fromarray(grey.astype(np.float32))]
    size = (resolution, resolution)
    squares = [np.asarray(ImageOps.fit(plane, size, Image.Resampling.LANCZOS)) for plane in planes]
    pixels = np.clip(np.stack(squares, axis=-1), 0, 255)
    return np.repeat(pixels, channels // len(planes), axis=-1)


# --- what the file says of itself ------------------------------------------------------------------------------------


def _tags(image: Image.Image) -> dict[int, object]:
    return image.tag_v2 if image.format == "TIFF" else {}


def _stored_bits(image: Image.Image) -> int:
    if image.format == "TIFF":
        return int(np.max(_tags(image).get(BITS, 1)))
    return 16 if image.mode.startswith("I;16") else 32 if image.mode in ("I", "F") else 8


def _png_header(path: Path) -> tuple[int, int | None]:
    """Bits a sample, and how many of them are significant (``sBIT``) where the file tells."""
    bits, significant = 8, None
    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] != b"IDAT":
            data = file.read(struct.unpack(">I", head[:4])[0])
            file.seek(4, 1)  # its checksum
            bits = data[8] if head[4:] == b"IHDR" else bits
            significant = max(data) if head[4:] == b"sBIT" else significant
    return bits, significant


def _declared(samples: np.ndarray, image: Image.Image, stored: int, significant: int | None) -> tuple[int | None, str]:
    """How many bits the file says its white has, and where it says so."""
    if 8 < stored < 16:
        return stored, f"its {stored} bits"
    for tag in MAX_SAMPLE_VALUES:
        top = int(np.max(_tags(image).get(tag, 0)))
        if top >= 255 and top & (top + 1) == 0:  # 2**bits - 1; any other number is a statistic of the picture
            return top.bit_length(), f"its tag MaxSampleValue={top}"
    if significant is None or not 0 < significant < 16:
        return (significant, "its sBIT") if significant == 16 else (None, "")
    if samples.max() >= 2**significant:  # scaled to all 16 bits, as the PNG specification wants it
        return 16, "16 bits"
    return (None, "") if _looks_scaled(samples, significant) else (significant, f"its sBIT of {significant}")


def _looks_scaled(samples: np.ndarray, bits: int) -> bool:
    """Whether the ``bits`` upper bits of 16 hold it all, the others zero or their repetition."""
    high = samples.astype(np.int64) >> (16 - bits)
    scaled = np.round(high * (65535 / (2**bits - 1)))
    return bool(((samples == high << (16 - bits)) | (samples == scaled)).all())


# --- the numbers -----------------------------------------------------------------------------------------------------


def _samples(image: Image.Image, path: Path) -> np.ndarray:
    """Every sample as it is stored, ``(H, W, C)``, upright."""
    orientation = read_orientation(image)
    image.load()  # finds damage
    is_big_endian = image.format == "TIFF" and image.tag_v2.prefix == b"MM"  # Pillow swaps the bytes of some twice
    if image.mode[0] in "IF" and not is_big_endian:
        return _single_samples(image)
    try:
        full = _png_samples(path) if image.format == "PNG" else _tiff_samples(path)
    except Exception as error:  # each decoder has its own
        reason = " ".join(str(error).split())
        raise PixelError(f"its samples cannot be read ({reason}): save it again without compression") from error
    return _upright(full, orientation)


def _single_samples(image: Image.Image) -> np.ndarray:
    values = np.asarray(upright(image))[..., None]  # a TIFF is upright since it was loaded
    is_signed = np.max(_tags(image).get(SAMPLE_FORMAT, 1)) == 2
    is_unsigned_32 = image.format == "TIFF" and values.dtype == np.int32 and not is_signed
    return values.view(np.uint32) if is_unsigned_32 else values


def _png_samples(path: Path) -> np.ndarray:
    import torch
    from torchvision.io import ImageReadMode, decode_png

    data = torch.from_numpy(np.fromfile(path, np.uint8))
    return decode_png(data, ImageReadMode.UNCHANGED).numpy().transpose(1, 2, 0)


def _tiff_samples(path: Path) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        values = page.asarray()
        if values.ndim == 2:
            return values[..., None]
        return np.moveaxis(values, 0, -1) if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE else values


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    samples = samples.swapaxes(0, 1) if orientation in (5, 6, 7, 8) else samples
    samples = samples[:, ::-1] if orientation in (2, 3, 6, 7) else samples
    return samples[::-1] if orientation in (3, 4, 7, 8) else samples


def _unit_floats(values: np.ndarray) -> np.ndarray:
    broken = np.argwhere(~np.isfinite(values))
    if len(broken):
        row, column = broken[0][:2]
        raise PixelError(
            f"the value at row {row}, column {column} (counted from 0) is {values[row, column, 0]}: "
            "every value must be finite; replace it and save again"
        )
    low, high = float(values.min()), float(values.max())
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise PixelError(f"values from {low:g} to {high:g}; floats must lie in [0, 1]: {_rescaling(low, high)}")
    return np.clip(values.astype(np.float64), 0, 1)


def _rescaling(low: float, high: float) -> str:
    if low < 0:
        return "save (x + 1) / 2 instead" if low >= -1 and high <= 1 else "shift and scale them, and save again"
    white = next((w for w in (255, 1023, 4095, 16383, 65535) if 2 < high <= w), "the number that is white")
    return f"divide by {white} and save again"


def _white(samples: np.ndarray, image: Image.Image, stored: int, significant: int | None, bit_depth: int | None) -> int:
    """The integer that is white: of ``bit_depth``, of the file's own words, or of all 16 bits where they are used."""
    low, high = int(samples.min()), int(samples.max())
    found = f"values from {low} to {high}"
    if low < 0:
        raise PixelError(f"{found}: a negative integer is no grey level; shift them and save unsigned 16 bits")
    bits, source = _declared(samples, image, stored, significant)
    if bit_depth is not None:
        bits, source = bit_depth, f"data.bit_depth={bit_depth}"
    if bits is not None and high >= 2**bits:
        raise PixelError(f"{found}: above {2**bits - 1}, the white of {source}; data.bit_depth=N makes it 2^N - 1")
    if bits is not None:
        return 2**bits - 1
    if stored != 16 or image.mode == "I":
        sign = "signed " if stored == 16 else ""
        raise PixelError(
            f"{sign}{stored}-bit {found}, and nothing says which is white: rescale them to 16 bits (0 to 65535) and "
            "save again, or say data.bit_depth=N where white is 2^N - 1"
        )
    _refuse_dark(samples, image, low)
    return 2**16 - 1


def _refuse_dark(samples: np.ndarray, image: Image.Image, low: int) -> None:
    colours = samples[..., :-1] if image.mode == "RGBA" else samples
    high = int(colours.max())
    if 0 < high < DARK:  # nothing but zeros is black at any depth
        likely = next(bits for bits in (8, 10, 12, 14) if high < 2**bits)
        raise PixelError(
            f"16-bit values from {low} to {high}, below a quarter of the range: probably {likely} bits stored in 16. "
            f"Rescale them to 0 to 65535 and save again, or say data.bit_depth={likely} "
            "(data.bit_depth=16 if the picture is that dark)"
        )


def _on_white(unit: np.ndarray, samples: np.ndarray, image: Image.Image) -> np.ndarray:
    """Colours ``(H, W, 1 or 3)`` without ink, spare channel or transparency."""
    if image.mode == "CMYK":
        return (1 - unit[..., :3]) * (1 - unit[..., 3:])
    if image.mode == "RGBA":  # a grey PNG too
        alpha = unit[..., -1:]
        is_multiplied = _tags(image).get(EXTRA) == (1,)
        return np.clip(unit[..., :-1] * (1 if is_multiplied else alpha) + 1 - alpha, 0, 1)
    if "transparency" in image.info:
        is_clear = (samples == np.array(image.info["transparency"])).all(axis=-1, keepdims=True)
        return np.where(is_clear, 1.0, unit)
    return unit[..., :3]
