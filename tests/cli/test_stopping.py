"""Ctrl-C and SIGTERM at any moment end in one sentence and a status of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STOPS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
LONG = {
    "posterior_sample.py": ["save_dir=out"],
    "train_prior.py": ["images=assets", "save_dir=out"],
    "generate.py": ["count=64", "out=x.png"],
}
STARTS = [("posterior_sample.py", signal.SIGINT, delay) for delay in (0.0, 0.1, 0.3, 0.6, 1.0, 3.0)]
STARTS += [("posterior_sample.py", signal.SIGTERM, delay) for delay in (0.1, 1.0)]
STARTS += [(program, number, 0.2) for program in ("train_prior.py", "generate.py") for number in STOPS]


def start(program, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, ROOT / program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def wait_until(holds, process):
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)


def handles(process, number):
    """Whether a process has set a handler of its own for a signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.parametrize(("program", "number", "delay"), STARTS)
def test_a_signal_while_it_starts(tmp_path, program, number, delay):
    process = start(program, *LONG[program], cwd=tmp_path)
    wait_until(lambda: handles(process, signal.SIGTERM), process)  # Python itself handles Ctrl-C only
    time.sleep(delay)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    status, word = STOPS[number]
    assert process.returncode == status and "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"{program}: {word}")
    if "before anything began" in err:
        assert (out, err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])


@pytest.mark.parametrize("number", STOPS, ids=["SIGINT", "SIGTERM"])
def test_a_signal_while_it_samples(arguments, tmp_path, number):
    slow = ("save_trajectory=false", "sampler.annealing.num_steps=100", f"save_dir={tmp_path}")
    process = start("posterior_sample.py", *arguments, *slow)
    records = tmp_path / "tiny" / "records"
    wait_until((records / "00001.claim").exists, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    status, word = STOPS[number]
    assert process.returncode == status and "Traceback" not in err
    said = f"posterior_sample.py: {word}; finished images are kept, the same command goes on"
    assert err.splitlines()[-1] == said
    assert (tmp_path / "tiny" / "metrics.json").exists() and not list(records.glob("*.claim"))
    assert [p.name for p in sorted(records.glob("*.json"))] == ["00000.json"]


def test_a_signal_during_a_sweep_ends_all_of_it(arguments, tmp_path):
    slow = ("save_trajectory=false", "sampler.annealing.num_steps=100", f"save_dir={tmp_path}")
    process = start("posterior_sample.py", "-m", *arguments[:-1], *slow, "device=cpu", "name=a,b")
    wait_until((tmp_path / "a" / "records" / "00000.claim").exists, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143 and not (tmp_path / "b").exists()


def test_a_program_that_was_told_to_ignore_signals_does(tmp_path):
    """As a shell does for what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start("generate.py", "count=0", cwd=tmp_path)  # refused once everything is loaded
    finally:
        signal.signal(signal.SIGINT, before)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and "count=0: must be at least 1" in err
