"""Waiting threads sleep, unless the user chose; signals are left alone by whoever merely imports."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from particledaps.settings import start_up
from particledaps.settings.start_up import WAITING, Terminated, begin, exit_stopped, let_waiting_threads_sleep, ready

ROOT = Path(__file__).resolve().parents[2]
WAITS = """
import sys
sys.path.insert(0, sys.argv[1])
if sys.argv[2] == "sleep":
    from particledaps.settings.start_up import let_waiting_threads_sleep
    let_waiting_threads_sleep()
import time, torch
torch.set_num_threads(2)
a = torch.ones(1 << 20)
for _ in range(3):
    a.add_(1)  # the second thread is there
own = time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID)
for _ in range(20):
    a.add_(1)
    time.sleep(0.05)  # nobody has anything to do
print(torch.get_num_threads(), time.clock_gettime(time.CLOCK_PROCESS_CPUTIME_ID) - own)
"""


def without(environment):
    return {k: v for k, v in environment.items() if k not in WAITING}


@pytest.fixture
def no_choice(monkeypatch):
    for name in WAITING:
        monkeypatch.setenv(name, "")  # so that it is taken back afterwards
        monkeypatch.delenv(name)


def test_waiting_threads_sleep(no_choice):
    let_waiting_threads_sleep()
    assert {name: os.environ[name] for name in WAITING} == {
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "30000",
        "KMP_BLOCKTIME": "1",
    }


@pytest.mark.parametrize("name", WAITING)
def test_the_choice_of_the_user_stands(no_choice, monkeypatch, name):
    monkeypatch.setenv(name, "7")
    let_waiting_threads_sleep()
    assert {n: os.environ.get(n) for n in WAITING} == {n: "7" if n == name else None for n in WAITING}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks for GNU's OpenMP and a second processor")
def test_torch_heeds_it():
    """A thread that waits for long costs hardly any processor time."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    used = {}
    for how in ("spin", "sleep"):
        environment = without(os.environ) | {"OMP_NUM_THREADS": "2"}
        if how == "spin":
            environment["OMP_WAIT_POLICY"] = "active"
        command = [sys.executable, "-c", WAITS, str(ROOT), how]
        threads, seconds = subprocess.check_output(command, env=environment, text=True).split()
        assert threads == "2"
        used[how] = float(seconds)
    assert used["sleep"] < 0.5 * used["spin"], used


def test_the_number_of_threads_is_not_touched(no_choice, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    before = dict(os.environ)
    let_waiting_threads_sleep()
    assert dict(os.environ) == before | WAITING


def test_programs_that_are_imported_leave_signals_and_threads_alone():
    code = "import signal, os, generate, posterior_sample; "
    code += "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "
    code += "signal.getsignal(signal.SIGINT) == signal.default_int_handler, 'GOMP_SPINCOUNT' in os.environ)"
    shown = subprocess.check_output([sys.executable, "-c", code], env=without(os.environ), cwd=ROOT, text=True)
    assert shown.split() == ["True", "True", "False"]


@pytest.fixture
def own_handlers(no_choice, monkeypatch):
    monkeypatch.setattr(start_up, "_begun", [])
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_after_the_imports_signals_raise(own_handlers):
    begin("some.py")
    ready()
    with pytest.raises(Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)  # a second one cuts nothing
    with pytest.raises(KeyboardInterrupt) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert not isinstance(stop.value, Terminated)


def test_later_imports_end_as_the_first_ones_do(own_handlers):
    with start_up.loading():  # a module that is imported by a test
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    begin("some.py")
    at_once = signal.getsignal(signal.SIGINT)
    ready()
    with start_up.loading():
        assert signal.getsignal(signal.SIGINT).__qualname__ == at_once.__qualname__ != "default_int_handler"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == start_up._terminate


def test_signals_that_are_ignored_stay_ignored(own_handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    begin("some.py")
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ready()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == start_up._terminate


@pytest.mark.parametrize(
    ("stop", "word", "status"), [(KeyboardInterrupt, "interrupted", 130), (Terminated, "terminated", 143)]
)
def test_who_stopped_it_is_said(capsys, stop, word, status):
    with pytest.raises(SystemExit) as end:
        exit_stopped("some.py", stop(), "images are kept")
    assert end.value.code == status and capsys.readouterr().err == f"some.py: {word}; images are kept\n"
