"""Strange names, bad files among good ones, damaged results, and what counts as data."""

import json
import os
import shutil

import metrics_schema
import numpy as np
import pytest
from PIL import Image
from test_run import comparable
from tiny import write_images

import particledaps.data.image_sets
import particledaps.runs.drawing
from particledaps.data.image_folder import image_files, other_files
from particledaps.names import shown
from particledaps.settings.statuses import BAD_INPUT, SKIPPED


@pytest.fixture
def folder(tmp_path):
    """Pictures 0.png, 1.png, 2.png of a folder of this test's own."""
    return write_images(tmp_path / "pictures")


@pytest.fixture
def run(tiny_run, folder):
    return lambda *more: tiny_run(f"data.dir={folder}", *more)


def status(tiny_run):
    rows = metrics_schema.load(tiny_run.folder / "metrics.json")["status"]["per_image"]
    return {row["image_id"]: row["state"] for row in rows}


NAMES = [b"cost_$10_vs_$20.png", b"caf\xe9.png", b"new\nline.png", b"\x1b[31mred.png", b"$\\frac.png"]
NAMES.append("猫.png".encode())


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_is_reconstructed_and_drawn(drawn_run, folder, name):
    shutil.copy(folder / "0.png", os.path.join(os.fsencode(folder), name))
    for number in range(3):
        (folder / f"{number}.png").unlink()
    outcome = drawn_run(f"data.dir={folder}", "save_trajectory=true")
    assert outcome.status == 0, outcome.err
    assert all(c.isprintable() or c in "\n\r" for c in outcome.out + outcome.err)
    record = json.loads((drawn_run.folder / "records" / "00000.json").read_text())
    assert record["input"]["name"] == os.fsdecode(name) and record["pictures_error"] is None
    with Image.open(drawn_run.folder / "sheets" / "00000.png") as sheet:
        assert sheet.width > 500
    assert "skipped" in drawn_run(f"data.dir={folder}").out


def test_a_refusal_names_a_strange_file_harmlessly(tiny_run, tmp_path):
    place = tmp_path / "\x1b[2Jclear"
    place.mkdir()
    (place / "\x1b[31mred.png").write_bytes(b"no image")
    outcome = tiny_run.command(f"data.dir={place}")
    assert outcome.status == BAD_INPUT and "\\x1b[31mred.png is not a readable image" in outcome.err
    assert "\x1b" not in outcome.err


def test_names_are_escaped_where_they_are_shown():
    assert shown("a\x1b[31m\n\u202e\udce9$ä猫") == "a\\x1b[31m\\n\\u202e\\udce9$ä猫"


def test_a_picture_that_cannot_be_drawn_costs_no_result(tiny_run, run, sampled, monkeypatch):
    def fails(*arguments):
        raise ValueError("no such glyph")

    monkeypatch.setattr(particledaps.runs.drawing, "contact_sheet", fails)
    outcome = run("data.end_id=1")
    assert outcome.status == 0
    assert "0: its pictures could not be drawn (ValueError: no such glyph); its numbers are saved" in outcome.out
    record = json.loads((tiny_run.folder / "records" / "00000.json").read_text())
    assert record["pictures_error"] == "ValueError: no such glyph" and record["state"] == "ok"
    assert (tiny_run.folder / "floats" / "00000.npz").exists()
    assert run("data.end_id=1").status == 0 and sampled == [0]


def test_a_process_that_died_while_it_drew_does_the_image_again(tiny_run, run, sampled, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(particledaps.runs.drawing, "contact_sheet", killed)
        assert run("data.end_id=1").status == 130
    assert status(tiny_run) == {0: "ok"}  # its numbers are there
    assert run("data.end_id=1").status == 0 and sampled == [0, 0]
    assert (tiny_run.folder / "sheets" / "00000.png").exists()


@pytest.mark.parametrize("place", ["floats/00001.npz", "samples/00001_selected.png", "sheets/00001.png"])
def test_a_cut_file_is_noticed_by_its_size(tiny_run, run, sampled, place):
    run()
    whole = comparable(tiny_run.folder)
    path = tiny_run.folder / place
    path.write_bytes(path.read_bytes()[:-3])
    outcome = run()
    assert f"{path} is damaged (another size than when it was written); done again" in outcome.out
    assert sampled == [0, 1, 2, 1] and comparable(tiny_run.folder) == whole


def test_files_that_were_removed_stay_away(tiny_run, run, sampled):
    run()
    shutil.rmtree(tiny_run.folder / "trajectory")
    (tiny_run.folder / "floats" / "00001.npz").unlink()
    assert run().status == 0 and sampled == [0, 1, 2]


def test_a_bad_file_among_good_ones_is_left_out(tiny_run, run, folder, sampled):
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    outcome = run()
    assert outcome.status == SKIPPED == 5
    assert "1: left out: " in outcome.out and "1.png is not a readable image" in outcome.out
    assert "image 1 was left out: its input cannot be read" in outcome.err
    assert status(tiny_run) == {0: "ok", 1: "skipped", 2: "ok"}
    metrics = metrics_schema.load(tiny_run.folder / "metrics.json")
    assert metrics["metadata"]["image_ids"] == [0, 2] and "not a readable image" in json.dumps(metrics["status"])
    write_images(folder)
    assert run().status == 0 and sampled == [0, 2, 1]
    assert status(tiny_run) == {0: "ok", 1: "ok", 2: "ok"}


def test_a_bad_file_ends_a_run_that_is_to_stop(tiny_run, run, folder, sampled):
    (folder / "2.png").write_bytes(b"")
    outcome = run("on_error=stop")
    assert outcome.status == BAD_INPUT and sampled == [] and not tiny_run.folder.exists()
    assert "2.png is not a readable image" in outcome.err
    assert "on_error=never: allowed are continue, stop" in run("on_error=never").err


def test_if_no_file_can_be_read_nothing_begins(tiny_run, run, folder, sampled):
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    outcome = run()
    assert outcome.status == BAD_INPUT and not tiny_run.folder.exists()
    assert "0.png is not a readable image" in outcome.err and "none of the 2 others can be read" in outcome.err


def test_pictures_are_read_when_it_is_their_turn(tiny_run, run, folder, monkeypatch):
    read, original = [], particledaps.data.image_sets.load_image

    def load_image(path, *rest):
        read.append(path.stem)
        return original(path, *rest)

    monkeypatch.setattr(particledaps.data.image_sets, "load_image", load_image)
    run("data.start_id=1", "data.end_id=2")
    assert read == ["1"]
    run()
    assert read == ["1", "0", "2"]


def test_what_is_data(tmp_path):
    root = write_images(tmp_path / "root", 1)
    for suffix in ("gif", "ppm", "pgm", "bmp", "tif", "webp"):
        Image.new("L", (16, 16)).save(root / f"a.{suffix}")
    (root / "._a.png").write_bytes(b"\0\5\x16\7")
    for hidden in (".ipynb_checkpoints", ".git"):
        write_images(root / hidden, 1)
    write_images(root / "inner" / "deep", 1)
    write_images(tmp_path / "elsewhere", 1)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "inner" / "back").symlink_to(root)  # a ring
    (root / "b.heic").write_bytes(b"")
    (root / "c.HEIC").write_bytes(b"")
    (root / "notes.txt").write_text("")
    names = [p.relative_to(root).as_posix() for p in image_files(root)]
    assert names == [
        "0.png",
        *(f"a.{s}" for s in ("bmp", "gif", "pgm", "ppm", "tif", "webp")),
        "inner/deep/0.png",
        "linked/0.png",
    ]
    assert other_files(root) == "left out, not read as images: 2 .heic, 1 .txt (convert pictures to PNG)"
    (root / "b.heic").unlink(), (root / "c.HEIC").unlink(), (root / "notes.txt").unlink()
    assert other_files(root) is None


@pytest.mark.parametrize("suffix", ["gif", "ppm"])
def test_other_formats_arrive_as_they_are(tiny_run, folder, suffix):
    grey = Image.fromarray(np.tile(np.arange(16, dtype=np.uint8) * 17, (16, 1)))
    for path in folder.iterdir():
        path.unlink()
    grey.convert("RGB" if suffix == "ppm" else "L").save(folder / f"ramp.{suffix}")
    assert tiny_run(f"data.dir={folder}").status == 0
    truth = np.load(tiny_run.folder / "floats" / "00000.npz")["truth"]
    assert np.allclose(truth[0, 0, 0], np.arange(16) * 17 / 127.5 - 1, atol=1e-6)


def test_a_bad_row_of_a_measurement_file_is_left_out(tiny_run, run, folder, tmp_path, sampled):
    assert run("name=source").status == 0
    rows = [np.load(tiny_run.save_dir / "source" / "floats" / f"0000{i}.npz")["y"] for i in range(3)]
    y = np.concatenate(rows)
    y[1] = np.nan
    y[2, 0, 3, 3] = np.inf
    np.savez(tmp_path / "y.npz", y=y)
    sampled.clear()
    arguments = ("data.dir=null", f"data.measurement={tmp_path / 'y.npz'}")
    outcome = tiny_run(*arguments)
    assert outcome.status == SKIPPED and sampled == [0]
    assert "measurement_00001: left out: " in outcome.out and "nothing is measured" in outcome.out
    assert "measurement_00002: left out: " in outcome.out and "infinite" in outcome.out
    assert status(tiny_run) == {0: "ok", 1: "skipped", 2: "skipped"}
    stopped = tiny_run(*arguments, "on_error=stop", "name=stopped")
    assert stopped.status == BAD_INPUT and "nothing is measured" in stopped.err
