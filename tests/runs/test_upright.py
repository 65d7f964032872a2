"""A picture is turned as its orientation says, whatever else is wrong with its EXIF."""

import random
import struct

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from particledaps.data.picture_files import load_image
from particledaps.data.upright import read_orientation, upright

SIDE = 16
NAN, MINUS_BY_ZERO = struct.pack("<d", float("nan")), struct.pack("<ii", -1, 0)
BROKEN = {
    "signed rational": (282, 10, 1, MINUS_BY_ZERO),
    "NaN": (282, 12, 1, NAN),
    "pointer out of the file": (34665, 4, 1, struct.pack("<I", 10**6)),
    "pointer of another type": (34665, 12, 1, NAN),
    "more than there is": (700, 1, 10**6, struct.pack("<I", 50)),
}
SAVED_AS = {"JPEG": {"quality": 100, "subsampling": 0}, "PNG": {}, "WEBP": {"lossless": True}}


def exif_bytes(orientation, *entries):
    """EXIF of little-endian entries (tag, type, count, value), which Pillow would not write."""
    entries = sorted([(274, 3, 1, struct.pack("<H", orientation)), *entries])
    body, data = struct.pack("<2sHIH", b"II", 42, 8, len(entries)), b""
    for tag, kind, count, value in entries:
        inline = len(value) <= 4
        field = value.ljust(4, b"\0") if inline else struct.pack("<I", 14 + 12 * len(entries) + len(data))
        body, data = body + struct.pack("<HHI", tag, kind, count) + field, data + (b"" if inline else value)
    return b"Exif\0\0" + body + struct.pack("<I", 0) + data


def colours():
    """No turn of it equals another."""
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def by_hand(pixels, orientation):
    """``(H, W, ...)`` as a viewer shows it: EXIF 2.32, table of tag 0x0112."""
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.swapaxes(0, 1),
        6: pixels[::-1].swapaxes(0, 1),
        7: pixels[::-1, ::-1].swapaxes(0, 1),
        8: pixels[:, ::-1].swapaxes(0, 1),
    }
    return turned.get(orientation, pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", SAVED_AS)
def test_every_orientation_is_that_of_pillow(tmp_path, kind, orientation):
    path = tmp_path / "a.image"
    colours().save(path, kind, exif=exif_bytes(orientation), **SAVED_AS[kind])
    with Image.open(path) as opened, Image.open(path) as raw:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        assert np.array_equal(expected, by_hand(np.asarray(raw.convert("RGB")), orientation))
    assert np.array_equal(load_image(path, SIDE), expected)


@pytest.mark.parametrize("orientation", [1, 2, 5, 6, 8])
@pytest.mark.parametrize("entry", BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("kind", SAVED_AS)
def test_the_rest_of_exif_may_be_broken(tmp_path, kind, entry, orientation):
    good, bad = tmp_path / "good.image", tmp_path / "bad.image"
    colours().save(good, kind, exif=exif_bytes(orientation), **SAVED_AS[kind])
    colours().save(bad, kind, exif=exif_bytes(orientation, entry), **SAVED_AS[kind])
    assert np.array_equal(load_image(bad, SIDE), load_image(good, SIDE))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("grey", [False, True])
def test_tiff(tmp_path, orientation, bits, grey):
    pixels = np.asarray(colours())[..., 0] if grey else np.asarray(colours())
    stored = pixels if bits == 8 else pixels.astype(np.uint16) * 257
    tags = [(274, 3, 1, orientation, True), (33437, 12, 1, float("nan"), True), (33434, 10, 1, (-1, 0), True)]
    tifffile.imwrite(tmp_path / "a.tif", stored, extratags=tags, photometric="minisblack" if grey else "rgb")
    expected = by_hand(pixels, orientation)[..., None] if grey else by_hand(pixels, orientation)
    assert np.allclose(load_image(tmp_path / "a.tif", SIDE, 1 if grey else 3), expected, atol=1e-3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("entry", [None, *BROKEN.values()], ids=["good", *BROKEN])
def test_png_of_16_bits(tmp_path, orientation, entry):
    grey = np.asarray(colours())[..., 0].astype(np.uint16) * 257
    exif = exif_bytes(orientation, *([] if entry is None else [entry]))
    Image.fromarray(grey).save(tmp_path / "a.png", exif=exif)
    assert np.allclose(load_image(tmp_path / "a.png", SIDE, 1)[..., 0], by_hand(grey / 257, orientation), atol=1e-3)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\x08\0\0", b"Exif\0\0nothing of the kind", exif_bytes(9)])
def test_exif_that_says_nothing_leaves_the_picture(tmp_path, exif):
    colours().save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "a.png", SIDE), np.asarray(colours()))


@pytest.mark.filterwarnings("ignore")
def test_no_damage_of_exif_costs_the_picture(tmp_path):
    generator, good = random.Random(0), exif_bytes(6, *BROKEN.values())
    allowed = [by_hand(np.asarray(colours()), orientation) for orientation in range(1, 9)]
    for trial in range(200):
        exif = bytearray(good)
        for _ in range(generator.randint(1, 8)):
            exif[generator.randrange(6, len(exif))] = generator.randrange(256)
        path = tmp_path / f"{trial}.png"
        colours().save(path, exif=bytes(exif[: generator.randint(7, len(exif))]))
        assert any(np.array_equal(load_image(path, SIDE), view) for view in allowed)


def test_the_orientation_of_a_picture_in_memory():
    image = colours()
    assert read_orientation(image) == 1 and np.array_equal(np.asarray(upright(image)), np.asarray(image))
    image.getexif()[0x0112] = 6
    assert read_orientation(image) == 6
    assert np.array_equal(np.asarray(upright(image)), by_hand(np.asarray(colours()), 6))
