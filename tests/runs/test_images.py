import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from particledaps.checks import DataError
from particledaps.data.image_folder import image_files
from particledaps.data.image_set import to_tensor
from particledaps.data.image_sets import demo_images, load_images
from particledaps.data.measurements import load_measurements
from particledaps.data.npz_images import npz_split, validation_indices
from particledaps.data.picture_files import load_image
from particledaps.settings.schema import DataSettings

WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def saved(folder, image, name="0.png", **options):
    image.save(folder / name, **options)
    return folder / name


def test_range_and_layout():
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[0, 0, 1] = (255, 0, 51)
    x = to_tensor(images)
    assert x.shape == (1, 3, 2, 2) and x.dtype == torch.float32
    assert x[0, :, 0, 1].tolist() == pytest.approx([1, -1, -0.6])


def test_grey(tmp_path):
    path = saved(tmp_path, Image.linear_gradient("L").resize((8, 8)))
    colour, grey = load_image(path, 8), load_image(path, 8, channels=1)
    assert colour.shape == (8, 8, 3) and grey.shape == (8, 8, 1)
    assert (colour == grey).all()


def test_colour_to_grey_by_luminance(tmp_path):
    grey = load_image(saved(tmp_path, Image.new("RGB", (8, 8), RED)), 8, channels=1)
    assert grey.shape == (8, 8, 1) and (grey == 76).all()


def test_transparency_is_laid_on_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    image.paste((0, 0, 0, 0), (0, 0, 8, 4))
    pixels = load_image(saved(tmp_path, image), 8)
    assert tuple(pixels[0, 0]) == WHITE
    assert np.abs(pixels[7, 0].astype(int) - (255, 127, 127)).max() <= 1


def test_transparency_of_grey_and_palette(tmp_path):
    grey = load_image(saved(tmp_path, Image.new("LA", (8, 8), (0, 0))), 8)
    assert (grey == 255).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*BLUE, *RED])
    palette.paste(0, (0, 0, 8, 4))
    assert tuple(load_image(saved(tmp_path, palette), 8)[0, 0]) == BLUE
    pixels = load_image(saved(tmp_path, palette, transparency=0), 8)
    assert tuple(pixels[0, 0]) == WHITE and tuple(pixels[7, 0]) == RED


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(tmp_path, suffix):
    values = np.full((8, 8), 32896, np.uint16)
    values[0] = 65535
    pixels = load_image(saved(tmp_path, Image.fromarray(values), f"0.{suffix}"), 8)
    assert pixels.dtype == np.float32
    assert (pixels[0] == 255).all() and (pixels[1:] == 128).all()


def test_a_dark_sixteen_bit_image_stays_dark(tmp_path):
    """A range below 2^14 is refused (fewer bits stored in 16?) and stays dark once it is said to be 16 bits."""
    path = saved(tmp_path, Image.fromarray(np.full((8, 8), 200, np.uint16)))
    with pytest.raises(DataError, match="16-bit values from 200 to 200.*data.bit_depth=16 if the picture is that dark"):
        load_image(path, 8)
    assert load_image(path, 8, bit_depth=16) == pytest.approx(np.full((8, 8, 3), 200 / 257), abs=1e-4)


def test_exif_rotation_is_undone(tmp_path):
    upright = Image.new("RGB", (8, 8), BLUE)
    upright.paste(RED, (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a clockwise quarter turn
    path = saved(tmp_path, upright.rotate(90), "0.jpg", exif=exif, quality=100, subsampling=0)
    pixels = load_image(path, 8)
    assert pixels[0, :, 0].min() > 200 and pixels[7, :, 2].min() > 200


@pytest.mark.parametrize("size", [(24, 8), (8, 24)])
def test_the_centre_square_is_cut(tmp_path, size):
    image = Image.new("RGB", size, BLUE)
    corner = ((size[0] - 8) // 2, (size[1] - 8) // 2)
    image.paste(RED, (*corner, corner[0] + 8, corner[1] + 8))
    pixels = load_image(saved(tmp_path, image), 8)
    assert (pixels == RED).all()


def test_other_sizes_are_resampled(tmp_path):
    large = load_image(saved(tmp_path, Image.new("CMYK", (50, 70), (0, 255, 255, 0)), "0.jpg"), 8)
    assert large.shape == (8, 8, 3) and large[..., 0].min() > 200 and large[..., 1:].max() < 60
    assert load_image(saved(tmp_path, Image.new("1", (4, 4), 1)), 8).min() == 255
    with pytest.raises(DataError, match="3x4 px: too small for a 8 px prior"):
        load_image(saved(tmp_path, Image.new("1", (3, 4))), 8)


def test_a_decompression_bomb_is_no_image(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    (tmp_path / "0.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )
    with pytest.raises(DataError, match="not a readable image"):
        load_image(tmp_path / "0.png", 8)


def test_natural_order(tmp_path):
    (tmp_path / "b").mkdir()
    names = ["2.png", "10.png", "1.PNG", "x10.jpg", "x9.JPEG", "b/3.webp", "01.png", "1²3.png", "3.bmp"]
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "folder.png").mkdir()
    ordered = [str(p.relative_to(tmp_path)) for p in image_files(tmp_path)]
    expected = ["01.png", "1.PNG", "1²3.png", "2.png", "3.bmp", "10.png", "b/3.webp", "x9.JPEG", "x10.jpg"]
    assert ordered == expected


def test_folder_ids_are_positions_in_the_folder(tmp_path):
    for index in range(12):
        Image.new("L", (8, 8), 20 * index).save(tmp_path / f"{index}.png")
    images = load_images(DataSettings("folder", str(tmp_path), start_id=9, end_id=11), (3, 8, 8))
    assert images.ids == (9, 10) and images.names == ("9", "10") and images.origins == ("data", "data")
    assert torch.allclose(images.pixels[1], torch.tensor(200 / 127.5 - 1))


@pytest.mark.parametrize(("start", "end"), [(0, 13), (12, None), (-1, 3), (5, 5)])
def test_ids_that_are_not_there(tmp_path, start, end):
    for index in range(12):
        Image.new("L", (8, 8)).save(tmp_path / f"{index}.png")
    with pytest.raises(DataError, match=f"start_id={start}.*ids 0 to 11"):
        load_images(DataSettings("folder", str(tmp_path), start_id=start, end_id=end), (3, 8, 8))


@pytest.fixture
def archive(tmp_path):
    """400 training images in 200 groups of two near-duplicates, and 3 test images; pixel = index."""

    def images(count):
        return np.tile(np.arange(count).reshape(-1, 1, 1, 1) % 256, (1, 8, 8, 3)).astype(np.uint8)

    path = tmp_path / "images.npz"
    np.savez(path, train_images=images(400), test_images=images(3), train_dupgroup=np.arange(400) // 2 + 1000)
    return path


def test_validation_keeps_groups_whole_and_apart(archive):
    groups = np.load(archive)["train_dupgroup"]
    held_out = validation_indices(groups)
    assert len(held_out) == 300
    rest = np.setdiff1d(np.arange(400), held_out)
    assert not set(groups[held_out]) & set(groups[rest])
    assert np.array_equal(held_out, validation_indices(groups))
    assert len(validation_indices(groups, 10)) == 20


def test_splits_of_an_archive(archive):
    splits = {name: npz_split(archive, name) for name in ("test", "validation", "train")}
    assert [len(s) for s in splits.values()] == [3, 300, 100]
    held_out = validation_indices(np.load(archive)["train_dupgroup"])
    assert np.array_equal(splits["validation"][:, 0, 0, 0], (held_out % 256).astype(np.uint8))
    assert np.isin(np.arange(400), held_out).sum() + len(splits["train"]) == 400
    images = load_images(DataSettings("npz", path=str(archive), start_id=1, end_id=3), (3, 8, 8))
    assert images.ids == (1, 2) and images.names == ("test_00001", "test_00002")


def test_archives_without_groups_or_colour(tmp_path):
    np.savez(tmp_path / "a.npz", train_images=np.zeros((160, 8, 8), np.uint8))
    assert npz_split(tmp_path / "a.npz", "train").shape == (10, 8, 8, 1)
    assert npz_split(tmp_path / "a.npz", "validation").shape == (150, 8, 8, 1)
    np.savez(tmp_path / "b.npz", train_images=np.zeros((160, 8, 8), np.uint8), train_dupgroup=np.arange(9))
    with pytest.raises(DataError, match=r"train_dupgroup has shape \(9,\), expected \(160,\)"):
        npz_split(tmp_path / "b.npz", "train")


@pytest.mark.parametrize("channels", [1, 3])
def test_demo(channels):
    demo = demo_images(16, channels)
    assert demo.pixels.shape[1:] == (channels, 16, 16)
    assert demo.names[0] == "chelsea" and demo.origins[0] == "photograph"
    assert demo.pixels[0].std() > 0.15
    assert demo.ids == tuple(range(len(demo)))
    assert set(demo.origins[1:]) == {"synthetic"}


@pytest.mark.parametrize(("side", "synthetic"), [(64, 2), (128, 2), (129, 0), (256, 0)])
def test_the_demo_of_a_large_prior_is_photographs(side, synthetic):
    demo = demo_images(side)
    assert demo.pixels.shape == (3, 3, side, side) and demo.origins.count("synthetic") == synthetic
    assert demo.ids == (0, 1, 2) and demo.names[0] == "chelsea"


def test_measurements(tmp_path):
    y = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float16)
    np.savez(tmp_path / "y.npz", y=y)
    loaded, ids = load_measurements(tmp_path / "y.npz", (2, 4))
    assert ids == (0, 1, 2) and loaded.dtype == torch.float32
    assert np.array_equal(loaded.numpy(), y.astype(np.float32))
    np.savez(tmp_path / "y.npz", y=y, image_ids=np.array([30, 10, 20]))
    loaded, ids = load_measurements(tmp_path / "y.npz", (2, 4), 15, 31)
    assert ids == (30, 20)
    assert np.array_equal(loaded.numpy(), y[[0, 2]].astype(np.float32))


@pytest.mark.parametrize("data", [DataSettings("demo"), DataSettings("folder", "pictures")], ids=["demo", "folder"])
@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_have_one_or_three_channels(data, channels):
    with pytest.raises(DataError, match=f"data={data.kind}: the prior's images have {channels} channels, .*data=npz"):
        load_images(data, (channels, 8, 8))


def test_arrays_may_have_any_number_of_channels(tmp_path):
    stored = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 2), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", test_images=stored)
    images = load_images(DataSettings("npz", path=str(tmp_path / "two.npz")), (2, 8, 8))
    assert torch.equal(images.pixels, to_tensor(stored))
