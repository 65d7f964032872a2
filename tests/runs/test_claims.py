"""Claims: one holder at a time, free when it is gone."""

import json
import multiprocessing as mp
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest

from particledaps.runs import claims
from particledaps.runs.claims import Claim, Holder, is_stale, read_holder, take, this_process


@pytest.fixture
def path(tmp_path):
    return tmp_path / "00000.claim"


def held_by(path, holder, age=0.0):
    path.write_text(json.dumps(asdict(holder)))
    then = time.time() - age
    os.utime(path, (then, then))


def dead_process():
    """The number of a process that has ended, and was waited for."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_claim_is_held_until_it_is_given_back(path):
    mine = take(path)
    assert isinstance(mine, Claim) and read_holder(path) == mine.holder
    assert take(path) == mine.holder
    mine.give_back()
    assert not path.exists()
    again = take(path)
    assert isinstance(again, Claim)
    again.give_back()


def test_a_dead_process_of_this_machine_frees_its_claim_at_once(path):
    held_by(path, replace(this_process(), pid=dead_process()))
    taken = take(path)
    assert isinstance(taken, Claim) and read_holder(path).pid == os.getpid()
    taken.give_back()


def test_a_process_number_that_was_given_again_is_another_process(path):
    held_by(path, replace(this_process(), started=this_process().started - 1))
    taken = take(path)
    assert isinstance(taken, Claim)
    taken.give_back()


def test_a_process_that_ended_but_was_not_waited_for_is_dead(path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended and stays a zombie
    started = claims._process(process.pid)[1]
    held_by(path, replace(this_process(), pid=process.pid, started=started))
    try:
        assert is_stale(path, read_holder(path))
    finally:
        process.wait()


@pytest.mark.parametrize(("age", "free"), [(0, False), (290, False), (310, True)])
def test_another_machine_must_renew_its_claim(path, age, free):
    held_by(path, replace(this_process(), host="elsewhere", pid=dead_process()), age)
    assert is_stale(path, read_holder(path)) == free


@pytest.mark.parametrize(("content", "age", "free"), [("", 0, False), ("{", 310, True), ("[1]", 310, True)])
def test_a_claim_that_cannot_be_read_counts_by_its_age(path, content, age, free):
    path.write_text(content)
    then = time.time() - age
    os.utime(path, (then, then))
    taken = take(path)
    assert isinstance(taken, Claim) == free
    if free:
        taken.give_back()


def test_a_holder_renews_and_stops_once_another_has_taken_it(path, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.02)
    mine = take(path)
    os.utime(path, (1, 1))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.stat().st_mtime > time.time() - 60
    other = Holder("elsewhere", "x", 1, 1, "t")
    held_by(path, other)
    mine.give_back()
    assert read_holder(path) == other


def test_what_an_interruption_left_is_given_back_and_nothing_of_others(tmp_path):
    held_by(tmp_path / "0.claim", this_process())
    held_by(tmp_path / "1.claim", replace(this_process(), pid=1))
    (tmp_path / "2.claim").write_text("")
    claims.give_back_all(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.claim", "2.claim"]


def _grab(folder, barrier, queue):
    got = []
    for number in range(40):
        barrier.wait()
        got.append(isinstance(take(folder / f"{number}.claim"), Claim))
    queue.put(got)
    barrier.wait()  # nobody leaves before all have tried, or a claim would be free again


@pytest.mark.parametrize("dead", [False, True], ids=["new", "of a dead process"])
def test_of_four_processes_one_gets_each_claim(tmp_path, dead):
    if dead:
        for number in range(40):
            held_by(tmp_path / f"{number}.claim", replace(this_process(), pid=dead_process() if number == 0 else 2**22))
    context = mp.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_grab, args=(tmp_path, barrier, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    rows = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert [sum(column) for column in zip(*rows, strict=True)] == [1] * 40
