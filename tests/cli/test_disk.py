"""Errors of the disk end in one sentence and a status of their own, and what is finished stays."""

import errno
import os
import shutil

import metrics_schema
import pytest

import particledaps.files
import sampler
from particledaps.settings.statuses import BAD_INPUT, DISK

REASONS = {
    "full": (errno.ENOSPC, "No space left on device"),
    "read-only": (errno.EROFS, "Read-only file system"),
    "broken": (errno.EIO, "Input/output error"),
    "quota": (errno.EDQUOT, "Disk quota exceeded"),
}


@pytest.fixture
def failing_disk(monkeypatch):
    """Make the replacement of files whose name contains ``part`` fail from the ``after``-th one on."""
    original = os.replace

    def fail(code, part, after=0):
        seen = []

        def replace(source, target):
            if part in str(target):
                seen.append(target)
                if len(seen) > after:
                    raise OSError(code, os.strerror(code), str(target))
            original(source, target)

        monkeypatch.setattr(particledaps.files.os, "replace", replace)

    yield fail
    monkeypatch.setattr(particledaps.files.os, "replace", original)


@pytest.mark.parametrize(("code", "words"), REASONS.values(), ids=REASONS)
@pytest.mark.parametrize("part", ["floats/00001", "records/00001"])
def test_in_the_middle_of_a_run(tiny_run, failing_disk, monkeypatch, sampled, code, words, part):
    failing_disk(code, part)
    outcome = tiny_run()
    assert outcome.status == DISK == 4
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith(f"posterior_sample.py: the disk refuses: {words} (") and "the same command goes on" in last
    assert "Traceback" not in outcome.err
    assert metrics_schema.load(tiny_run.folder / "metrics.json")["metadata"]["image_ids"] == [0]
    assert not [p for p in tiny_run.folder.rglob("*") if ".tmp" in p.name or p.suffix == ".claim"]
    monkeypatch.undo()
    assert tiny_run().status == 0
    assert metrics_schema.load(tiny_run.folder / "metrics.json")["metadata"]["image_ids"] == [0, 1, 2]


@pytest.mark.parametrize("part", ["metrics.json", "config.yaml"])
def test_at_the_ends_of_a_run(tiny_run, failing_disk, part):
    failing_disk(errno.ENOSPC, part)
    outcome = tiny_run("data.end_id=1")
    assert outcome.status == DISK and "No space left on device" in outcome.err and "Traceback" not in outcome.err


def test_a_full_disk_while_pictures_are_drawn_keeps_the_numbers(tiny_run, failing_disk):
    failing_disk(errno.ENOSPC, "samples/")
    outcome = tiny_run("data.end_id=1")
    assert outcome.status == 0 and "its pictures could not be drawn (OSError: [Errno 28] No space left" in outcome.out
    assert metrics_schema.load(tiny_run.folder / "metrics.json")["metadata"]["image_ids"] == [0]


def test_a_name_that_is_too_long_for_the_disk(tiny_run, tmp_path):
    outcome = tiny_run.command(f"name={'ä' * 120}")
    assert outcome.status == BAD_INPUT and "of 1 to 200 characters" in outcome.err
    outcome = tiny_run(f"save_dir={tmp_path}/{'a' * 300}")
    assert outcome.status in (BAD_INPUT, DISK) and "File name too long" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_folder_that_vanishes(tiny_run, monkeypatch, sampled):
    original = sampler.LatentDAPS.sample

    def sample(self, y, streams, *rest):
        if streams.image_id == 1:
            shutil.rmtree(tiny_run.folder)
        return original(self, y, streams, *rest)

    monkeypatch.setattr(sampler.LatentDAPS, "sample", sample)
    outcome = tiny_run()
    assert outcome.status == DISK and "the disk refuses: No such file or directory" in outcome.err
    assert "Traceback" not in outcome.err
