"""A run that goes on looks at what lies under an index: pictures added, replaced, renamed; measurements; records."""

import json
import os
import shutil

import metrics_schema
import numpy as np
import pytest
from PIL import Image
from test_run import comparable, estimates
from tiny import write_images, write_tiny_prior

import particledaps.reports.read_metrics


@pytest.fixture
def folder(tmp_path):
    """Pictures b.png and d.png; returns their folder."""
    write_images(tmp_path / "pictures", 4, seed=5)
    for number, name in enumerate("abcd"):
        (tmp_path / "pictures" / f"{number}.png").rename(tmp_path / f"{name}.png")
    for name in "bd":
        shutil.copy(tmp_path / f"{name}.png", tmp_path / "pictures")
    return tmp_path / "pictures"


@pytest.fixture
def run(tiny_run, folder):
    def start(*more):
        outcome = tiny_run(f"data.dir={folder}", *more)
        assert outcome.status == 0, outcome.err
        return outcome

    return start


def names(tiny_run):
    """Image id -> name of its input, as metrics.json tells."""
    rows = metrics_schema.load(tiny_run.folder / "metrics.json")["inputs"]["per_image"]
    return {row["image_id"]: row["name"] for row in rows}


def truth(tiny_run, image_id):
    with np.load(tiny_run.folder / "floats" / f"{image_id:05d}.npz") as arrays:
        return arrays["truth"]


def test_a_new_picture_gets_a_new_id_and_finished_ones_keep_theirs(tiny_run, run, folder, sampled):
    run()
    before = estimates(tiny_run.folder, 0)
    shutil.copy(folder.parent / "a.png", folder)
    shutil.copy(folder.parent / "c.png", folder)
    outcome = run()
    assert names(tiny_run) == {0: "b.png", 1: "d.png", 2: "a.png", 3: "c.png"}
    assert sampled == [0, 1, 2, 3] and outcome.out.count("skipped") == 2
    assert np.array_equal(estimates(tiny_run.folder, 0), before)
    run()
    assert sampled == [0, 1, 2, 3]
    first, second = folder.parent / "a.png", tiny_run.folder / "samples" / "00002_selected.png"
    assert second.exists() and np.allclose(truth(tiny_run, 2), pixels(first))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1


def test_a_replaced_picture_is_done_again(tiny_run, run, folder, sampled):
    run()
    before = estimates(tiny_run.folder, 0)
    shutil.copy(folder.parent / "c.png", folder / "b.png")
    outcome = run()
    assert sampled == [0, 1, 0] and "b: its input was replaced since it was reconstructed; done again" in outcome.out
    assert not np.array_equal(estimates(tiny_run.folder, 0), before)
    assert np.allclose(truth(tiny_run, 0), pixels(folder.parent / "c.png"))


def test_a_replaced_picture_that_is_not_asked_for_counts_no_more(tiny_run, run, folder, sampled):
    run()
    shutil.copy(folder.parent / "c.png", folder / "d.png")
    outcome = run("data.end_id=1")
    assert "d: its input was replaced since it was reconstructed; its numbers count no more (image 1)" in outcome.out
    assert names(tiny_run) == {0: "b.png"} and sampled == [0, 1]
    run()
    assert sampled == [0, 1, 1]


def test_a_renamed_picture_keeps_its_id_and_counts_once(tiny_run, run, folder, sampled):
    run()
    (folder / "b.png").rename(folder / "z.png")
    run()
    assert sampled == [0, 1] and list(names(tiny_run)) == [0, 1]


def test_a_picture_that_went_away_leaves_the_others_their_ids(tiny_run, run, folder, sampled):
    run()
    (folder / "b.png").unlink()
    run()
    assert sampled == [0, 1] and names(tiny_run) == {0: "b.png", 1: "d.png"}


def test_a_run_without_a_table_of_ids_goes_on(tiny_run, run, folder, sampled):
    """As commit 2b9fc01 stored it: no table, no inputs in records."""
    run()
    (tiny_run.folder / "images.json").unlink()
    for path in (tiny_run.folder / "records").glob("0*.json"):
        record = json.loads(path.read_text())
        for key in ("input", "environment", "prior_sha256", "checksum"):
            del record[key]
        path.write_text(json.dumps(record))
    shutil.copy(folder.parent / "a.png", folder)
    run()
    assert sampled == [0, 1, 2]
    table = json.loads((tiny_run.folder / "images.json").read_text())
    assert table == {"b.png": 0, "d.png": 1, "a.png": 2}
    shutil.copy(folder.parent / "c.png", folder / "b.png")
    run()
    assert sampled == [0, 1, 2, 0]  # found by the measurement, which the old record describes


def test_results_inside_the_folder_of_images_are_no_images(tiny_run, folder, sampled):
    for _ in range(2):
        outcome = tiny_run(f"data.dir={folder}", f"save_dir={folder}")
        assert outcome.status == 0
    assert sampled == [0, 1]
    assert tiny_run(f"data.dir={folder}", f"save_dir={folder}", "name=other").status == 0
    assert sampled == [0, 1, 0, 1]


@pytest.fixture
def measured(tiny_run, folder, sampled):
    """A run on a file of two measurements; returns the run and the file."""
    assert tiny_run(f"data.dir={folder}", "name=source").status == 0
    path = folder.parent / "y.npz"
    rows = [np.load(tiny_run.save_dir / "source" / "floats" / f"0000{i}.npz")["y"] for i in range(2)]
    np.savez(path, y=np.concatenate(rows))
    sampled.clear()

    def start(*more):
        outcome = tiny_run("data.dir=null", f"data.measurement={path}", *more)
        assert outcome.status == 0, outcome.err
        return outcome

    return start, path, np.concatenate(rows)


def test_a_replaced_measurement_is_done_again(measured, tiny_run, sampled):
    start, path, y = measured
    start()
    stamp = path.stat()
    np.savez(path, y=y[::-1])
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as a copy that keeps times: of the same size, too
    outcome = start()
    assert sampled == [0, 1, 0, 1] and outcome.out.count("done again") == 2
    np.savez(path, y=np.stack([y[1], y[1]]))
    start("data.end_id=1")
    assert names(tiny_run) == {0: "measurement_00000"}  # the second one has changed, and was not asked for


def test_a_replaced_archive_of_images_is_done_again(tiny_run, tmp_path, sampled):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    arguments = ("data=npz", f"data.path={tmp_path / 'x.npz'}", "data.dir=null")
    np.savez(tmp_path / "x.npz", test_images=images)
    assert tiny_run(*arguments).status == 0
    images[1] = 255 - images[1]
    np.savez(tmp_path / "x.npz", test_images=images)
    assert tiny_run(*arguments).status == 0
    assert sampled == [0, 1, 2, 1]


def test_a_record_copied_over_another_is_no_record(tiny_run, run, sampled):
    run()
    whole = comparable(tiny_run.folder)
    records = tiny_run.folder / "records"
    shutil.copy(records / "00000.json", records / "00001.json")
    shutil.copy(records / "00000.json", records / "copy of 00000.json")
    outcome = run()
    assert sampled == [0, 1, 1] and "00001.json cannot be read and counts as not there" in outcome.out
    assert comparable(tiny_run.folder) == whole


SPOILED = {
    "empty": b"",
    "cut": None,
    "zeros": bytes(3000),
    "an object": b"{}",
    "a list": b"[1, 2]",
    "no text": b"\xff\xfe\x00",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", SPOILED.values(), ids=SPOILED)
def test_a_damaged_record_is_done_again(tiny_run, run, sampled, content):
    run()
    whole = comparable(tiny_run.folder)
    path = tiny_run.folder / "records" / "00001.json"
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    run("data.end_id=1")  # of an image that was not asked for: it does not disturb
    assert names(tiny_run) == {0: "b.png"}
    run()
    assert sampled == [0, 1, 1] and comparable(tiny_run.folder) == whole


def test_a_flipped_bit_of_a_record_is_noticed(tiny_run, run, sampled):
    run()
    path = tiny_run.folder / "records" / "00001.json"
    text = path.read_text()
    place = text.index('"loss": [') + 25
    digit = next(i for i in range(place, place + 50) if text[i].isdigit())
    path.write_text(text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :])
    run()
    assert sampled == [0, 1, 1]


def test_other_weights_under_the_same_path_are_refused(tiny_run, folder, tmp_path, sampled, tiny_prior):
    shutil.copytree(tiny_prior, tmp_path / "prior")
    arguments = (f"model.path={tmp_path / 'prior'}", f"data.dir={folder}")
    assert tiny_run(*arguments, "data.end_id=1").status == 0
    write_tiny_prior(tmp_path / "prior", seed=1)
    outcome = tiny_run(*arguments)
    assert outcome.status == 2 and sampled == [0]
    assert "the prior has other weights than when" in outcome.err and "choose another name=" in outcome.err


def test_runs_pair_by_the_names_of_their_inputs(tiny_run, folder):
    """The same two pictures in another order of ids: equal numbers only where the noise has the same id."""
    assert tiny_run(f"data.dir={folder}").status == 0
    shutil.copy(folder.parent / "a.png", folder)
    assert tiny_run(f"data.dir={folder}").status == 0  # b 0, d 1, a 2
    assert tiny_run(f"data.dir={folder}", "name=fresh").status == 0  # a 0, b 1, d 2
    first = particledaps.reports.read_metrics.read_run(tiny_run.folder)
    fresh = particledaps.reports.read_metrics.read_run(tiny_run.save_dir / "fresh")
    assert [i.source for i in first.images.values()] == ["b.png", "d.png", "a.png"]
    assert [i.source for i in fresh.images.values()] == ["a.png", "b.png", "d.png"]
    assert all(
        a.sha256 == b.sha256 for a in first.images.values() for b in fresh.images.values() if a.source == b.source
    )
