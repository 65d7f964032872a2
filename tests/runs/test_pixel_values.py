"""Numeric ranges of pictures: a ramp from black to white arrives as one, or the picture is refused with its range."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from particledaps.checks import DataError
from particledaps.data.image_sets import load_images
from particledaps.data.picture_files import load_image
from particledaps.data.pixel_values import deep_planes
from particledaps.data.training_views import Augmentation, load_training_images
from particledaps.settings.schema import DataSettings

SIDE = 16
RAMP = np.linspace(0, 1, SIDE * SIDE).reshape(SIDE, SIDE)
"""From black to white."""
RGB = np.stack([RAMP, RAMP.T, 1 - RAMP], axis=-1)
GREY_ALPHA = np.stack([RAMP, RAMP.T], axis=-1)
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def levels(unit, bits, dtype=np.uint16):
    return np.round(unit * (2**bits - 1)).astype(dtype)


def write_png(path, samples, **chunks):
    """A 16-bit PNG of ``(H, W[, C])`` samples; chunks by name, before the pixels."""
    samples = samples if samples.ndim == 3 else samples[..., None]
    height, width, channels = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[channels], 0, 0, 0)
    parts = {"IHDR": header} | chunks | {"IDAT": zlib.compress(rows), "IEND": b""}
    body = b"".join(
        struct.pack(">I", len(data)) + name.encode() + data + struct.pack(">I", zlib.crc32(name.encode() + data))
        for name, data in parts.items()
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def write_tiff(path, samples, **options):
    tifffile.imwrite(path, samples, **options)
    return path


def packed_tiff(path, samples):
    """A TIFF of 12 bits a sample, two of them in three bytes, as cameras write it."""
    first, second = samples.reshape(-1, 2).T
    data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8).tobytes()
    tags = {256: SIDE, 257: SIDE, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: SIDE, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + data)
    return path


def unit_of(path, bit_depth=None):
    """The picture at its own size, in [0, 1], before any resizing."""
    with Image.open(path) as image:
        image.filename = ""
        planes = deep_planes(image, path, bit_depth)
    return np.stack([np.asarray(plane) for plane in planes], axis=-1) / 255


def assert_is(path, expected, tolerance=1e-6, bit_depth=None):
    found = unit_of(path, bit_depth)
    expected = expected if expected.ndim == 3 else expected[..., None]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance


def refused(path, *words, bit_depth=None):
    with pytest.raises(DataError) as error:
        load_image(path, SIDE, bit_depth=bit_depth)
    assert str(path) in str(error.value) and all(word in str(error.value) for word in words), error.value


# --- floats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_ramp_of_floats_arrives_as_a_ramp(tmp_path, byteorder, compression):
    path = write_tiff(tmp_path / "a.tif", RAMP.astype(np.float32), byteorder=byteorder, compression=compression)
    assert_is(path, RAMP)
    assert load_image(path, SIDE)[..., 1] == pytest.approx(255 * RAMP, abs=0.255)


def test_deep_and_shallow_pictures_of_one_folder_keep_their_own_precision(tmp_path):
    write_tiff(tmp_path / "0.tif", RAMP.astype(np.float32))
    Image.fromarray(levels(RAMP.T, 8, np.uint8)).save(tmp_path / "1.png")
    write_png(tmp_path / "2.png", levels(RAMP, 12))
    data = DataSettings(kind="folder", dir=str(tmp_path), bit_depth=12)
    floats, eight, twelve = load_images(data, (1, SIDE, SIDE)).pixels.numpy()[:, 0]
    assert floats == pytest.approx(2 * RAMP - 1, abs=1e-6)
    assert (eight == levels(RAMP.T, 8).astype(np.float32) / np.float32(127.5) - 1).all()
    assert twelve == pytest.approx(levels(RAMP, 12) / 4095 * 2 - 1, abs=1e-6)


def test_rounding_outside_of_the_unit_range_is_tolerated_and_clipped(tmp_path):
    values = RAMP.astype(np.float32) * np.float32(1 + 5e-7)
    assert_is(write_tiff(tmp_path / "a.tif", values), RAMP)
    assert unit_of(tmp_path / "a.tif").max() == 1


@pytest.mark.parametrize(
    ("scale", "shift", "words"),
    [
        (247, 3, ("values from 3 to 250; floats must lie in [0, 1]", "divide by 255 and save again")),
        (4095, 0, ("values from 0 to 4095;", "divide by 4095")),
        (2, -1, ("values from -1 to 1;", "save (x + 1) / 2 instead")),
        (300, -100, ("values from -100 to 200;", "shift and scale")),
        (1.5, 0, ("values from 0 to 1.5;", "divide by the number that is white")),
    ],
)
def test_other_ranges_of_floats_are_refused_with_the_remedy(tmp_path, scale, shift, words):
    refused(write_tiff(tmp_path / "a.tif", (RAMP * scale + shift).astype(np.float32)), *words)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_place(tmp_path, value):
    values = RAMP.astype(np.float32)
    values[3, 5] = value
    refused(write_tiff(tmp_path / "a.tif", values), f"row 3, column 5 (counted from 0) is {value}", "must be finite")


# --- 16 bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [RAMP, RGB], ids=["grey", "colour"])
@pytest.mark.parametrize("write", [write_png, write_tiff])
def test_the_full_range_of_sixteen_bits_keeps_its_precision(tmp_path, write, unit):
    path = write(tmp_path / "a.img", levels(unit, 16))
    assert_is(path, levels(unit, 16) / 65535)
    resized = load_image(path, SIDE)
    assert resized.dtype == np.float32
    assert np.abs(resized - 255 * (unit if unit.ndim == 3 else unit[..., None])).max() < 0.01


@pytest.mark.parametrize("options", [{"byteorder": ">"}, {"compression": "zlib"}, {"planarconfig": "separate"}])
def test_sixteen_bit_colour_of_every_tiff_layout(tmp_path, options):
    samples = levels(RGB, 16)
    samples = np.moveaxis(samples, -1, 0) if "planarconfig" in options else samples
    assert_is(write_tiff(tmp_path / "a.tif", samples, photometric="rgb", **options), RGB, 1e-5)


@pytest.mark.parametrize("write", [write_png, write_tiff])
@pytest.mark.parametrize("unit", [RAMP, RGB], ids=["grey", "colour"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14])
def test_fewer_bits_stored_in_sixteen_are_refused_until_they_are_said(tmp_path, write, unit, bits):
    path = write(tmp_path / "a.img", levels(unit, bits))
    refused(path, f"16-bit values from 0 to {2**bits - 1}", f"data.bit_depth={bits} (data.bit_depth=16 if", "Rescale")
    assert_is(path, levels(unit, bits) / (2**bits - 1), bit_depth=bits)
    assert load_image(path, SIDE, bit_depth=bits).max() == pytest.approx(255, abs=0.255)


def test_transparency_of_twelve_bit_pictures_does_not_hide_their_range(tmp_path):
    for alpha in (4095, 65535):
        samples = np.dstack([levels(RGB, 12), np.full((SIDE, SIDE), alpha, np.uint16)])
        refused(write_png(tmp_path / "a.png", samples), "16-bit values from 0 to 4095")
    refused(write_png(tmp_path / "b.png", levels(GREY_ALPHA, 12)), "16-bit values from 0 to 4095")


def test_a_value_above_the_said_depth_is_refused(tmp_path):
    path = write_png(tmp_path / "a.png", levels(RAMP, 14))
    refused(path, "values from 0 to 16383: above 4095, the white of data.bit_depth=12", bit_depth=12)


def test_black_at_any_depth_is_black(tmp_path):
    assert_is(write_png(tmp_path / "a.png", np.zeros((SIDE, SIDE), np.uint16)), np.zeros((SIDE, SIDE)), 0)


def test_eight_bits_do_not_heed_the_depth(tmp_path):
    Image.fromarray(levels(RGB, 8, np.uint8)).save(tmp_path / "a.png")
    plain, said = (load_image(tmp_path / "a.png", 8, bit_depth=bits) for bits in (None, 12))
    assert plain.dtype == said.dtype == np.uint8 and (plain == said).all()


# --- what the file says of itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [RAMP, RGB], ids=["grey", "colour"])
def test_significant_bits_of_a_png_are_honoured(tmp_path, unit):
    significant = bytes([12] * (1 if unit.ndim == 2 else 3))
    assert_is(write_png(tmp_path / "a.png", levels(unit, 12), sBIT=significant), levels(unit, 12) / 4095)


def test_significant_bits_that_were_scaled_to_sixteen_as_the_specification_wants(tmp_path):
    twelve = levels(RAMP, 12)
    repeated = twelve << 4 | twelve >> 8
    assert_is(write_png(tmp_path / "a.png", repeated, sBIT=b"\x0c"), twelve / 4095, 2e-5)
    dark = levels(RAMP / 20, 12) << 4  # below 4096 in 16 bits: either dark and scaled, or 12 bits as they are
    refused(write_png(tmp_path / "b.png", dark, sBIT=b"\x0c"), "16-bit values from 0 to")
    assert_is(tmp_path / "b.png", dark / 65535, bit_depth=16)


def test_packed_twelve_bits_of_a_tiff_are_honoured(tmp_path):
    assert_is(packed_tiff(tmp_path / "a.tif", levels(RAMP, 12)), levels(RAMP, 12) / 4095)
    dark = levels(RAMP / 8, 12)
    assert_is(packed_tiff(tmp_path / "b.tif", dark), dark / 4095)


@pytest.mark.parametrize("tag", [281, 341])
def test_the_largest_sample_value_of_a_tiff_is_honoured_where_it_is_a_white(tmp_path, tag):
    samples = levels(RAMP / 2, 12)
    path = write_tiff(tmp_path / "a.tif", samples, extratags=[(tag, 3, 1, 4095, True)])
    assert_is(path, samples / 4095)
    statistic = write_tiff(tmp_path / "b.tif", samples, extratags=[(tag, 3, 1, 2048, True)])
    refused(statistic, "16-bit values from 0 to 2048")
    too_small = write_tiff(tmp_path / "c.tif", samples, extratags=[(tag, 3, 1, 1023, True)])
    refused(too_small, "values from 0 to 2048: above 1023, the white of its tag MaxSampleValue=1023")
    assert_is(too_small, samples / 4095, bit_depth=12)


# --- other integers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(
    ("dtype", "top", "kind"),
    [
        (np.int32, 70000, "32-bit values from 0 to 70000"),
        (np.int32, 200, "32-bit values from 0 to 200"),
        (np.uint32, 3_000_000_000, "32-bit values from 0 to 3000000000"),
        (np.int16, 32767, "signed 16-bit values from 0 to 32767"),
    ],
)
def test_wide_integers_are_refused_until_the_depth_is_said(tmp_path, dtype, top, kind, byteorder, compression):
    samples = np.round(RAMP * top).astype(dtype)
    path = write_tiff(tmp_path / "a.tif", samples, byteorder=byteorder, compression=compression)
    if (dtype, byteorder) == (np.uint32, ">"):
        return refused(path, "is not a readable image")  # Pillow knows none
    refused(path, kind, "nothing says which is white", "data.bit_depth=N")
    bits = top.bit_length()
    assert_is(path, samples / (2**bits - 1), bit_depth=bits)


@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_negative_integers_are_refused(tmp_path, dtype):
    path = write_tiff(tmp_path / "a.tif", (levels(RAMP, 12, np.int32) - 5).astype(dtype))
    refused(path, "values from -5 to 4090: a negative integer", bit_depth=12)


# --- layouts ---------------------------------------------------------------------------------------------------------


def test_transparency_of_sixteen_bits_is_laid_on_white(tmp_path):
    on_white = GREY_ALPHA[..., :1] * GREY_ALPHA[..., 1:] + 1 - GREY_ALPHA[..., 1:]
    assert_is(write_png(tmp_path / "a.png", levels(GREY_ALPHA, 16)), on_white.repeat(3, -1)[..., :1], 2e-5)
    alpha = RAMP[..., None]
    straight = levels(np.dstack([RGB, RAMP]), 16)
    assert_is(write_png(tmp_path / "b.png", straight), RGB * alpha + 1 - alpha, 3e-5)
    kinds = {"unassalpha": straight, "assocalpha": levels(np.dstack([RGB * alpha, RAMP]), 16)}
    for kind, samples in kinds.items():
        path = write_tiff(tmp_path / f"{kind}.tif", samples, photometric="rgb", extrasamples=[kind])
        assert_is(path, RGB * alpha + 1 - alpha, 3e-5)
    spare = write_tiff(tmp_path / "spare.tif", straight, photometric="rgb", extrasamples=["unspecified"])
    assert_is(spare, RGB, 1e-5)


def test_a_transparent_colour_of_sixteen_bits_becomes_white(tmp_path):
    for unit, key in ((RAMP, struct.pack(">H", 65535 // 3)), (RGB, struct.pack(">HHH", 0, 0, 65535))):
        path = write_png(tmp_path / "a.png", levels(unit, 16), tRNS=key)
        expected = unit.reshape(SIDE, SIDE, -1).copy()
        clear = (levels(expected, 16) == np.frombuffer(key, ">u2")).all(-1)
        assert clear.sum() == 1
        expected[clear] = 1
        assert_is(path, expected, 1e-5)


def test_ink_and_white_is_zero(tmp_path):
    inks = np.dstack([RGB, RAMP * 0.5])
    path = write_tiff(tmp_path / "a.tif", levels(inks, 16), photometric="separated")
    assert_is(path, (1 - RGB) * (1 - RAMP[..., None] * 0.5), 3e-5)
    assert_is(write_tiff(tmp_path / "b.tif", levels(RAMP, 16), photometric="miniswhite"), 1 - RAMP, 1e-5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("unit", [RAMP[:8], RGB[:8]], ids=["grey", "colour"])
def test_rotation_is_undone_in_every_layout(tmp_path, orientation, unit):
    samples = levels(unit, 16)
    tag = [(0x0112, 3, 1, orientation, True)]
    eight = Image.fromarray((samples >> 8).astype(np.uint8))
    eight.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(eight)) / 255
    exif = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01" + struct.pack(">HHI", orientation, 0, 0)
    assert_is(write_png(tmp_path / "a.png", samples, eXIf=exif), expected, 0.005)
    for compression, byteorder in ((None, "<"), ("zlib", "<"), (None, ">"), ("zlib", ">")):
        path = write_tiff(tmp_path / "a.tif", samples, extratags=tag, compression=compression, byteorder=byteorder)
        assert_is(path, expected, 0.005)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [8, 16])
def test_a_turned_tiff_that_is_not_square_keeps_its_rows(tmp_path, orientation, bits):
    """Pillow maps such a file into memory with its sides swapped: rows of the wrong length, then turned."""
    unit = np.repeat(np.repeat(np.array([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]), SIDE, 0), SIDE, 1)
    samples = levels(unit, bits, np.uint8 if bits == 8 else np.uint16)
    path = write_tiff(tmp_path / "a.tif", samples, extratags=[(0x0112, 3, 1, orientation, True)])
    upright = Image.fromarray(levels(unit, 8, np.uint8))
    upright.getexif()[0x0112] = orientation
    ImageOps.exif_transpose(upright).save(tmp_path / "b.png")
    expected = load_image(tmp_path / "b.png", SIDE)
    assert load_image(path, SIDE) == pytest.approx(expected, abs=5)  # 8 bits clip Lanczos between its passes


def test_grey_of_deep_colour_is_the_luminance_of_eight_bits(tmp_path):
    Image.fromarray(levels(RGB, 8, np.uint8)).save(tmp_path / "8.png")
    write_png(tmp_path / "16.png", levels(RGB, 16))
    eight, sixteen = (load_image(tmp_path / f"{bits}.png", SIDE // 2, channels=1) for bits in (8, 16))
    assert sixteen.shape == (SIDE // 2, SIDE // 2, 1)
    assert np.abs(eight - sixteen).max() < 1.5


def test_a_damaged_deep_picture_is_no_image(tmp_path):
    path = write_png(tmp_path / "a.png", levels(RGB, 16))
    path.write_bytes(path.read_bytes()[:200])
    refused(path, "is not a readable image")


def test_a_compression_that_cannot_be_read_in_full_is_refused_with_a_remedy(tmp_path):
    Image.fromarray(levels(RAMP, 16)).save(tmp_path / "grey.tif", compression="tiff_lzw")
    assert_is(tmp_path / "grey.tif", RAMP, 1e-5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("particledaps.data.pixel_values._tiff_samples", lambda path: 1 / 0)
        path = write_tiff(tmp_path / "a.tif", levels(RGB, 16))
        refused(path, "its samples cannot be read (division by zero)", "without compression")


def test_training_takes_deep_pictures_as_eight_bits(tmp_path):
    for name in ("0", "1", "2"):
        write_tiff(tmp_path / f"{name}.tif", RAMP.astype(np.float32))
    images = load_training_images(tmp_path, None, SIDE, Augmentation(0.5, 0.5))
    assert images.images.numpy()[0, 0] == pytest.approx(np.round(255 * RAMP))
    assert images.images.numpy().dtype == np.uint8
