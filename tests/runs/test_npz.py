"""Archives from anywhere: only what is asked for is read, and nothing absurd is believed."""

import io
import zipfile

import numpy as np
import pytest

from particledaps.checks import DataError
from particledaps.data import npz
from particledaps.data.npz import Archive

VALUES = np.arange(60, dtype=np.float32).reshape(5, 3, 4)


@pytest.fixture(params=[np.savez, np.savez_compressed])
def path(request, tmp_path):
    arrays = {"a": VALUES, "f": np.asfortranarray(VALUES), "text": np.array("centre"), "empty": np.zeros((0, 3))}
    request.param(tmp_path / "x.npz", **arrays)
    return tmp_path / "x.npz"


@pytest.mark.parametrize("key", ["a", "f"])
@pytest.mark.parametrize("rows", [None, [], [0], [4], [0, 1, 4], [1, 3], [0, 1, 2, 3, 4]])
def test_rows(path, key, rows):
    with Archive(path) as archive:
        found = archive.read(key, rows)
    assert found.dtype == VALUES.dtype
    assert np.array_equal(found, VALUES if rows is None else VALUES[rows])


def test_headers_text_and_nothing(path):
    with Archive(path) as archive:
        assert archive.files == ["a", "f", "text", "empty"]
        assert archive.header("a") == ((5, 3, 4), np.dtype(np.float32))
        assert str(archive.read("text")) == "centre"
        assert archive.read("empty").shape == (0, 3)
        with pytest.raises(DataError, match=r"no array 'b' \(it holds a, f, text, empty\)"):
            archive.read("b")


def test_one_image_of_a_large_file_takes_the_memory_of_one(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "x.npz", a=np.zeros((2000, 100, 100), np.uint8))
    largest, original = [0], np.empty

    def empty(shape, *rest):
        made = original(shape, *rest)
        largest[0] = max(largest[0], made.nbytes)
        return made

    monkeypatch.setattr(npz.np, "empty", empty)
    with Archive(tmp_path / "x.npz") as archive:
        assert archive.read("a", [1999]).shape == (1, 100, 100)
    assert largest[0] == 10_000


def written(tmp_path, header, content=b"", **more):
    """An archive whose array ``a`` has a header of its own making."""
    start = io.BytesIO()
    np.lib.format.write_array_header_1_0(start, header)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", start.getvalue() + content, **more)
    return tmp_path / "x.npz"


@pytest.mark.parametrize(
    ("header", "content", "reason"),
    [
        ({"shape": (10**12,), "fortran_order": False, "descr": "<f8"}, b"", "8,000,000,000,000 bytes, but it holds 0"),
        ({"shape": (2, 10**9, 10**9), "fortran_order": True, "descr": "<f8"}, b"x" * 99, "but it holds 99"),
        ({"shape": (2,), "fortran_order": False, "descr": "<f8"}, b"x" * 15, "16 bytes, but it holds 15"),
        ({"shape": (2,), "fortran_order": False, "descr": "|O"}, b"x" * 16, "holds Python objects"),
        ({"shape": (-1,), "fortran_order": False, "descr": "<f8"}, b"", "is damaged"),
    ],
    ids=["absurd", "absurd fortran", "short", "objects", "negative"],
)
def test_a_header_that_lies_is_refused_before_anything_is_read(tmp_path, header, content, reason):
    with Archive(written(tmp_path, header, content)) as archive, pytest.raises(DataError, match=reason):
        archive.read("a")


def test_a_zip_bomb_is_refused_before_it_unfolds(tmp_path, monkeypatch):
    path = written(tmp_path, {"shape": (50_000_000,), "fortran_order": False, "descr": "|u1"}, bytes(50_000_000))
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(npz.os, "sysconf", {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 60_000}.get)
    with Archive(path) as archive, pytest.raises(DataError, match=r"takes 0\.1 GB in memory, more than half"):
        archive.read("a")


@pytest.mark.parametrize("spoil", ["cut", "flipped", "text", "missing", "no array"])
def test_damage_is_one_sentence(tmp_path, spoil):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, a=np.random.default_rng(0).normal(size=1000))
    content = bytearray(path.read_bytes())
    content[300] ^= 255
    if spoil == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif spoil == "flipped":
        path.write_bytes(bytes(content))
    elif spoil == "text":
        path.write_text("y = 1")
    elif spoil == "missing":
        path.unlink()
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "")
    with pytest.raises(DataError) as caught, Archive(path) as archive:
        archive.read("a")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
