"""Measurements with gaps, in files of several formats: what was not measured is left out, what is not read is said."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from particledaps.checks import DataError
from particledaps.data.masks import gaps
from particledaps.data.measurements import load_measurements
from particledaps.data.npz import Archive
from particledaps.reports.pictures import GAP_COLOUR, measurement_picture

QUICK = ("num_samples=1", "data.dir=null")
PLANE = (3, 24, 24)


@pytest.fixture
def y(tiny_run):
    """Amplitudes ``(1, 3, 24, 24)`` of a run."""
    assert tiny_run("data.end_id=1", "name=source", "num_samples=1").status == 0
    return np.load(tiny_run.save_dir / "source" / "floats" / "00000.npz")["y"].clip(0)


@pytest.fixture
def run(tiny_run, tmp_path):
    """Reconstruct arrays; gives the outcome, the floats and the record."""

    def reconstruct(name, *more, **arrays):
        np.savez(tmp_path / "y.npz", **arrays)
        outcome = tiny_run(*QUICK, f"data.measurement={tmp_path / 'y.npz'}", f"name={name}", *more)
        assert outcome.status == 0, outcome.err
        return outcome, floats(tiny_run, name), measurement(tiny_run, name)

    return reconstruct


def floats(tiny_run, name):
    with np.load(tiny_run.save_dir / name / "floats" / "00000.npz") as arrays:
        return dict(arrays)


def measurement(tiny_run, name):
    return json.loads((tiny_run.save_dir / name / "metrics.json").read_text())["measurement"]["per_image"][0]


def dead_lines():
    mask = np.ones((24, 24))
    mask[10:12], mask[:, 15] = 0, 0  # beside frequency 0, which is at 12
    return mask


def test_a_mask_beside_y_is_the_same_as_nan_and_not_the_same_as_zeros(y, run):
    mask = dead_lines()
    outcome, by_mask, row = run("mask", y=y * mask, mask=mask)
    _, by_nan, other = run("nan", y=np.where(mask, y, np.nan))
    _, by_zeros, _ = run("zeros", y=y * mask)
    assert "y.npz: 210 of 1,728 entries of y (12.2%, in 1 of 1 measurements) are not measured" in outcome.out
    assert np.array_equal(by_mask["estimates"], by_nan["estimates"]) and row == other
    assert not np.allclose(by_mask["estimates"], by_zeros["estimates"], atol=1e-4)
    squares = (amplitudes(by_mask["estimates"]) - y * mask) ** 2
    assert row["loss"] == pytest.approx([(squares * mask).sum()], rel=0.03)  # images are saved clipped
    assert squares.sum() > 1.3 * row["loss"][0]


def amplitudes(x):
    padded = np.pad(x / 2 + 0.5, ((0, 0), (0, 0), (4, 4), (4, 4)))
    return np.abs(np.fft.fftshift(np.fft.fft2(padded, norm="ortho"), axes=(-2, -1)))


def test_what_stands_at_masked_entries_changes_nothing(y, run):
    mask = dead_lines()
    absurd = np.where(mask, y, 1e30)
    absurd[0, 0, 10, 3] = np.inf
    assert np.array_equal(
        run("zeros", y=y * mask, mask=mask)[1]["estimates"], run("absurd", y=absurd, mask=mask)[1]["estimates"]
    )


def test_a_mask_of_ones_leaves_the_numbers_bit_for_bit(y, run):
    outcome, with_mask, row = run("ones", y=y, mask=np.ones(PLANE, bool))
    _, without, other = run("plain", y=y)
    assert np.array_equal(with_mask["estimates"], without["estimates"]) and row == other
    assert "not measured" not in outcome.out


@pytest.mark.parametrize("keys", [["task.origin=corner"], ["task.origin=corner", "task.measurement=intensity"]])
def test_a_mask_moves_with_the_origin(y, run, keys):
    mask = dead_lines()
    power = len(keys)
    corner, its_mask = (np.fft.ifftshift(a, axes=(-2, -1)) for a in (y**power, mask))
    _, shifted, row = run("corner", *keys, y=corner * its_mask, mask=its_mask)
    _, centred, other = run("centre", y=y, mask=mask)
    assert np.array_equal(np.isnan(shifted["y"][0, 0]), mask == 0)
    assert row["noise_floor"] == pytest.approx(other["noise_floor"], rel=1e-5)
    assert np.allclose(shifted["estimates"], centred["estimates"], atol=1e-3)


def test_what_a_run_saved_says_its_gaps_and_gives_the_same_again(y, run, tiny_run):
    _, first, row = run("first", y=y, mask=dead_lines())
    assert np.array_equal(np.isnan(first["y"][0]), np.broadcast_to(dead_lines() == 0, PLANE)) and "mask" not in first
    file = tiny_run.save_dir / "first" / "floats" / "00000.npz"
    outcome = tiny_run(*QUICK, f"data.measurement={file}", "name=again")
    assert outcome.status == 0 and "not read" not in outcome.out
    assert np.array_equal(floats(tiny_run, "again")["estimates"], first["estimates"])
    assert measurement(tiny_run, "again") == row


def test_a_changed_mask_is_another_input(y, run, tiny_run, sampled):
    run("same", y=y, mask=dead_lines())
    run("same", y=y, mask=dead_lines())
    assert sampled == [0]
    outcome, *_ = run("same", y=y, mask=np.flip(dead_lines()))
    assert sampled == [0, 0] and "its input was replaced" in outcome.out


def test_other_tasks_leave_entries_out_too(run):
    generator = np.random.default_rng(0)
    y, mask = generator.normal(size=(1, 3, 4, 4)), generator.random((3, 4, 4)) > 0.3
    _, found, row = run("down", "task=down_sampling", y=y, mask=mask)
    assert row["noise_floor"] == pytest.approx(mask.sum() * 0.05**2, rel=1e-5)
    blocks = found["estimates"].reshape(1, 3, 4, 4, 4, 4).mean((3, 5))
    assert row["loss"] == pytest.approx([((blocks - y) ** 2 * mask).sum()], rel=0.02)  # images are saved clipped
    assert np.array_equal(np.isnan(found["y"][0]), ~mask)


def test_the_mask_of_inpainting_tells_pixels_and_nan_tells_entries(run):
    y = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).clip(-1, 1)
    seen = np.random.default_rng(1).random((16, 16)) > 0.4
    holes = np.broadcast_to(np.random.default_rng(2).random((16, 16)) > 0.8, y.shape)
    outcome, found, row = run("holes", "task=inpainting", y=np.where(holes, np.nan, y), mask=seen)
    assert "are not measured (NaN) and are left out" in outcome.out
    assert np.array_equal(found["mask"][0], seen) and np.array_equal(np.isnan(found["y"]), holes)
    expected = (seen & ~holes).sum() * 0.05**2 + (y**2)[~seen & ~holes].sum()
    assert row["noise_floor"] == pytest.approx(expected, rel=1e-5)
    _, plain, other = run("plain", "task=inpainting", y=y, mask=seen)
    assert other["noise_floor"] == pytest.approx(3 * seen.sum() * 0.05**2 + (y**2 * ~seen).sum(), rel=1e-5)


def test_an_array_that_nobody_reads_is_named(y, run):
    outcome, *_ = run("two", y=y, foo=np.ones(3), bar=np.ones(2))
    assert "y.npz: arrays foo, bar are not read (known: y, image_ids, mask, estimates, truth, " in outcome.out
    outcome, *_ = run("one", y=y, Mask=dead_lines())
    assert "y.npz: array Mask is not read (known: y, image_ids, mask, " in outcome.out
    outcome, *_ = run("kernel", y=y, kernel=np.ones((3, 3)))
    assert "y.npz: array kernel is not read" in outcome.out
    outcome, *_ = run("none", y=y, image_ids=np.array([0]), truth=np.zeros(2))
    assert "not read" not in outcome.out


MASKS = {
    "plane": lambda m: m[0, 0],
    "whole numbers": lambda m: m[0, 0].astype(np.uint8),
    "bool": lambda m: m[0, 0].astype(bool),
    "floats": lambda m: m[0, 0].astype(np.float16),
    "one plane": lambda m: m[:1, 0],
    "channels": lambda m: m[0],
    "one of channels": lambda m: m[:1],
}


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 4, 6)])
@pytest.mark.parametrize("form", MASKS.values(), ids=MASKS)
def test_one_mask_for_all(tmp_path, shape, form):
    mask = (np.random.default_rng(0).random((1, 1, 4, 6)) > 0.5).astype(float).repeat(shape[0], 1)
    y = np.random.default_rng(1).normal(size=(5, *shape))
    np.savez(tmp_path / "y.npz", y=y, mask=form(mask))
    loaded, _ = load_measurements(tmp_path / "y.npz", shape, 1, 4)
    assert np.array_equal(loaded.numpy(), np.where(mask, y, np.nan)[1:4].astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("planes", [True, False])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_mask_each_goes_with_the_ids(tmp_path, planes, count):
    generator = np.random.default_rng(0)
    mask = generator.random((count, 1 if planes else 3, 4, 6)) > 0.5
    y, ids = generator.normal(size=(count, 3, 4, 6)), generator.permutation(count)
    given = mask[:, 0] if planes and count != 3 else mask
    np.savez(tmp_path / "y.npz", y=y, mask=given, image_ids=ids)
    loaded, found = load_measurements(tmp_path / "y.npz", (3, 4, 6), 1, count)
    rows = ids >= 1
    assert found == tuple(ids[rows])
    assert np.array_equal(loaded.numpy(), np.where(mask, y, np.nan)[rows].astype(np.float32), equal_nan=True)


def test_measurements_of_any_shape_have_masks(tmp_path):
    y, mask = np.arange(20.0).reshape(4, 5), np.array([1, 0, 1, 1, 0])
    for given in (mask, mask[None].repeat(4, 0)):
        np.savez(tmp_path / "y.npz", y=y, mask=given)
        loaded, _ = load_measurements(tmp_path / "y.npz", (5,))
        assert np.array_equal(loaded.numpy(), np.where(mask, y, np.nan), equal_nan=True)


def test_a_mask_that_could_be_of_channels_or_of_measurements_is_asked_about(tmp_path):
    y, mask = np.zeros((3, 3, 4, 6)), np.ones((3, 4, 6))
    np.savez(tmp_path / "y.npz", y=y, mask=mask)
    with pytest.raises(DataError, match=r"save it as \(1, 3, 4, 6\) or as \(3, 1, 4, 6\)"):
        load_measurements(tmp_path / "y.npz", (3, 4, 6))
    mask[1] = 0
    for given, axis in ((mask[None], 1), (mask[:, None], 0)):
        np.savez(tmp_path / "y.npz", mask=given)
        with Archive(tmp_path / "y.npz") as archive:
            found = np.broadcast_to(gaps(archive, (3, 4, 6), [0, 1, 2], 3), y.shape)
        assert np.array_equal(found, np.moveaxis(np.broadcast_to([0, 1, 0], (3, 4, 6, 3)), 3, axis))


BAD = {
    "infinite": ({"y": np.where(np.eye(24), np.inf, 1)}, "image 0: y holds infinite values"),
    "nothing": ({"y": np.ones(PLANE), "mask": np.zeros((24, 24))}, "image 0: nothing is measured"),
    "inverted": ({"y": np.where(np.eye(24), np.nan, 1), "mask": np.eye(24)}, "(1 = measured, 0 = not)"),
    "second row": ({"y": np.stack([np.full(PLANE, np.nan)] * 2)}, "none of the 1 others can be read"),
    "bytes": ({"y": np.ones(PLANE), "mask": np.full((24, 24), 255)}, "other values than 0 and 1 (255 to 255)"),
    "weights": ({"y": np.ones(PLANE), "mask": np.full((24, 24), 0.5)}, "other values than 0 and 1 (0.5 to 0.5)"),
    "nan": ({"y": np.ones(PLANE), "mask": np.full((24, 24), np.nan)}, "other values than 0 and 1 (NaN)"),
    "shape": ({"y": np.ones(PLANE), "mask": np.ones((24, 20))}, "mask is float64 (24, 20), expected 0 and 1"),
    "count": ({"y": np.ones(PLANE), "mask": np.ones((2, 24, 24))}, "(24, 24), (3, 24, 24) or one for each of the 1"),
    "text": ({"y": np.ones(PLANE), "mask": np.full((24, 24), "a")}, "mask is <U1 (24, 24)"),
    "complex": ({"y": np.ones(PLANE, complex)}, "magnitudes of complex numbers are np.abs(y)"),
}


@pytest.mark.parametrize(("arrays", "words"), BAD.values(), ids=BAD)
def test_what_cannot_be_meant_is_refused(tiny_run, tmp_path, arrays, words):
    arrays["y"] = np.broadcast_to(arrays["y"], (arrays["y"].shape[:-3] or (1,)) + PLANE)
    np.savez(tmp_path / "y.npz", **arrays)
    outcome = tiny_run.command(*QUICK, f"data.measurement={tmp_path / 'y.npz'}")
    assert outcome.status == 2 and words in outcome.err and outcome.err.count("\n") == 1
    assert str(tmp_path / "y.npz") in outcome.err and not tiny_run.save_dir.exists()


def test_a_beam_stop_is_reconstructed_around(y, run):
    y = np.where(np.add.outer(np.abs(np.arange(24) - 12), np.abs(np.arange(24) - 12)) < 4, np.nan, y)
    _, found, row = run("stop", y=y)
    residuals = amplitudes(found["estimates"]) - y
    assert row["loss"] == pytest.approx([np.nansum(residuals**2)], rel=0.03)  # images are saved clipped
    own = 9  # the stop takes whole pairs; of the self-conjugate entries those at the borders stay
    half = (np.isfinite(y).sum() - own) / 2 + own
    assert row["noise_floor_std"] == pytest.approx(0.05**2 * (2 * half) ** 0.5, rel=1e-5)


def red(picture):
    return (picture == torch.tensor(GAP_COLOUR)[:, None, None]).all(0)


def test_gaps_are_red_and_leave_the_scale_of_the_rest(tmp_path):
    y = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) + 1
    whole = measurement_picture(y)
    y[:, 2], y[0, 4, 4] = torch.nan, torch.nan
    y[:, 3, 3] = 1e-3
    picture = measurement_picture(y)
    assert picture.shape == (3, 6, 6) and picture.isfinite().all()
    assert red(picture)[2].all() and red(picture).sum() == 6
    others = picture[:, [0, 1, 3, 4, 5]]
    assert (others.min().item(), others.max().item()) == pytest.approx((-1, 1))
    assert whole.shape == (1, 6, 6)


def test_gaps_of_a_picture_are_red():
    y = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    holes = y.clone()
    holes[:, 1, 1], holes[0, 2, 2] = torch.nan, torch.nan
    picture = measurement_picture(holes, holes)
    assert red(picture).nonzero().tolist() == [[1, 1]]
    assert picture[:, 2, 2].tolist() == pytest.approx([y[1:, 2, 2].mean().item(), *y[1:, 2, 2].tolist()])
    assert torch.equal(picture[:, 0], y[:, 0])


def test_the_sheet_shows_what_was_not_measured(drawn_run, tmp_path):
    y = np.random.default_rng(0).random((1, 3, 16, 16))
    np.savez(tmp_path / "y.npz", y=y, mask=np.arange(16) % 16 < 12 * np.ones((16, 1)))
    arguments = ("task=gaussian_blur", *QUICK, f"data.measurement={tmp_path / 'y.npz'}")
    assert drawn_run(*arguments).status == 0
    with Image.open(drawn_run.folder / "sheets" / "00000.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"), int)
    assert ((pixels[..., 0] - pixels[..., 1] > 150) & (pixels[..., 0] - pixels[..., 2] > 150)).mean() > 0.02


def test_npy_and_a_single_measurement_give_what_npz_gives(y, run, tiny_run, tmp_path):
    _, expected, row = run("npz", y=y)
    _, single, other = run("single", y=y[0])
    assert np.array_equal(single["estimates"], expected["estimates"]) and row == other
    for name, array in (("many", y), ("alone", y[0]), ("fortran", np.asfortranarray(y))):
        np.save(tmp_path / f"{name}.npy", array)
        assert tiny_run(*QUICK, f"data.measurement={tmp_path / name}.npy", f"name={name}").status == 0
        assert np.array_equal(floats(tiny_run, name)["estimates"], expected["estimates"])


def test_rows_of_an_npy(tmp_path):
    y = np.random.default_rng(0).normal(size=(7, 2, 4)).astype(np.float32)
    np.save(tmp_path / "y.npy", y)
    loaded, ids = load_measurements(tmp_path / "y.npy", (2, 4), 3, 6)
    assert ids == (3, 4, 5) and np.array_equal(loaded.numpy(), y[3:6])


def test_inpainting_needs_more_than_an_npy_holds(tiny_run, tmp_path):
    np.save(tmp_path / "y.npy", np.zeros((1, 3, 16, 16), np.float32))
    outcome = tiny_run.command("task=inpainting", *QUICK, f"data.measurement={tmp_path}/y.npy")
    assert outcome.status == 2 and "has no array 'mask'" in outcome.err


def test_an_npy_is_held_to_what_its_header_says(tmp_path):
    np.save(tmp_path / "y.npy", np.zeros((2, 2, 4)))
    (tmp_path / "y.npy").write_bytes((tmp_path / "y.npy").read_bytes()[:-8])
    with pytest.raises(DataError, match="128 bytes, but it holds 120"):
        load_measurements(tmp_path / "y.npy", (2, 4))
    np.save(tmp_path / "y.npy", np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(DataError, match="holds Python objects, which are not read"):
        load_measurements(tmp_path / "y.npy", (2, 4))


FOREIGN = {
    "y.mat": (b"MATLAB 5.0 MAT-file, ...", "import scipy.io; np.savez('y.npz', y=scipy.io.loadmat({file})['NAME'])"),
    "new.mat": (b"MATLAB 7.3 MAT-file, ...", "import h5py; np.savez('y.npz', y=h5py.File({file})['NAME'][()].T)"),
    "y.h5": (b"\x89HDF\r\n\x1a\n", "import h5py; np.savez('y.npz', y=h5py.File({file})['NAME'][()])"),
    "y.HDF5": (b"", "h5py.File({file})['NAME'][()])"),
    "unnamed": (b"\x89HDF\r\n\x1a\n", "h5py.File({file})['NAME'][()])"),
    "y.tif": (b"II*\0", "import tifffile; np.savez('y.npz', y=tifffile.imread({file}))"),
    "y.tiff": (b"MM\0*", "tifffile.imread({file})"),
    "y.png": (b"\x89PNG\r\n\x1a\n", "from PIL import Image; np.savez('y.npz', y=np.atleast_3d(np.asarray(Image.open("),
    "y.csv": (b"1,2", "np.savez('y.npz', y=np.loadtxt({file}, delimiter=',').reshape((-1, 3, 24, 24)))"),
    "y.txt": (b"1 2", "np.savez('y.npz', y=np.loadtxt({file}).reshape((-1, 3, 24, 24)))"),
    "y.pt": (b"PK\3\4", "y=torch.load({file}, map_location='cpu', weights_only=True).numpy())"),
    "y.pth": (b"", "weights_only=True"),
    "y.safetensors": (b"", "load_file({file})['NAME']"),
    "y.fits": (b"SIMPLE  =", "from astropy.io import fits; np.savez('y.npz', y=fits.getdata({file}))"),
    "y.mrc": (b"", "import mrcfile; np.savez('y.npz', y=mrcfile.read({file}))"),
    "y.pkl": (b"\x80\4", "a pickle, which can run any code when it is opened, and is not read; in the program that"),
    "y.xyz": (
        b"hello",
        "is not a readable .npy or .npz file; in the program that made it, import numpy as np; np.savez",
    ),
    "y.npy": (
        b"hello",
        "is not a readable .npy or .npz file; in the program that made it, import numpy as np; np.savez",
    ),
}


@pytest.mark.parametrize(("name", "content", "words"), [(n, *v) for n, v in FOREIGN.items()], ids=FOREIGN)
def test_other_formats_are_refused_with_the_python_that_converts_them(tiny_run, tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)
    outcome = tiny_run.command(*QUICK, f"data.measurement={file}")
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and not tiny_run.save_dir.exists()
    assert words.format(file=repr(str(file))) in outcome.err and "import numpy as np; " in outcome.err
    assert "y of the shape (N, 3, 24, 24) or (3, 24, 24)" in outcome.err
    assert "allow_pickle" not in outcome.err and "pickle.load" not in outcome.err
    assert "torch.load" not in outcome.err or "weights_only=True" in outcome.err


CONVERTED = {
    "y.mat": lambda path, y: __import__("scipy.io").io.savemat(path, {"NAME": y}),
    "y.tif": lambda path, y: __import__("tifffile").imwrite(path, y, photometric="minisblack"),
    "y.csv": lambda path, y: np.savetxt(path, y.ravel(), delimiter=","),
    "y.txt": lambda path, y: np.savetxt(path, y.ravel()),
    "y.pt": lambda path, y: torch.save(torch.from_numpy(y), path),
}


@pytest.mark.parametrize(("name", "write"), CONVERTED.items(), ids=CONVERTED)
def test_the_python_that_is_shown_works(tmp_path, monkeypatch, name, write):
    y = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    write(tmp_path / name, y)
    with pytest.raises(DataError) as caught:
        load_measurements(tmp_path / name, (3, 4, 4))
    monkeypatch.chdir(tmp_path)
    lines = str(caught.value).split("to convert it: ")[1].split(", y of the shape")[0]
    exec(lines, {})
    loaded, ids = load_measurements(tmp_path / "y.npz", (3, 4, 4))
    assert ids == (0, 1) and np.array_equal(loaded.numpy(), y)


def test_a_picture_becomes_one_measurement(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "y.png")
    with pytest.raises(DataError) as caught:
        load_measurements(tmp_path / "y.png", (3, 4, 5))
    monkeypatch.chdir(tmp_path)
    exec(str(caught.value).split("to convert it: ")[1].split(", y of the shape")[0], {})
    loaded, _ = load_measurements(tmp_path / "y.npz", (3, 4, 5))
    assert np.array_equal(loaded[0].numpy(), pixels.transpose(2, 0, 1))


def test_an_npz_is_known_by_its_content(tmp_path):
    np.savez(tmp_path / "y.npz", y=np.ones((1, 2, 4)))
    for name in ("y.dat", "y.npy", "y"):
        (tmp_path / name).write_bytes((tmp_path / "y.npz").read_bytes())
        assert load_measurements(tmp_path / name, (2, 4))[0].shape == (1, 2, 4)
    assert load_measurements(tmp_path / "y", (2, 4))[1] == (0,)
