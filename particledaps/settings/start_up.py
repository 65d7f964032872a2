"""What a program does before it loads torch: waiting threads soon sleep, signals end it in one sentence, torch waits.

Standard library only. A program calls :func:`begin` before its other imports and :func:`ready` once its work begins;
imports of that moment and later ones stand under :func:`loading`, which ends in :func:`ready`. Until then a signal ends
the process at once: a library could swallow an exception, or a module be left half loaded. A module that is merely
imported calls none of them, and nothing happens.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from particledaps.settings.lazy_torch import load_torch_when_used

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "30000", "KMP_BLOCKTIME": "1"}
"""How OpenMP (any, GNU's, Intel's) is told that a thread that waits for the others spins for a millisecond at most.

A thread that sleeps at once takes long to wake: a level costs 1.35 times as much on a quiet machine. One that spins for
longer costs its neighbours' time (``benchmarks/bench_busy.py``, ``docs/lab/strangers.md``).
"""
WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


_begun: list[str] = []


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends the work as Ctrl-C does, with a sentence and a status of its own."""


def begin(program: str) -> None:
    """Call before torch is imported: let waiting threads sleep soon, and end in a sentence while modules load.

    Args:
        program: its name in messages.
    """
    let_waiting_threads_sleep()
    load_torch_when_used()
    _begun.append(program)
    _leave_at_once(program)


@contextmanager
def loading() -> Iterator[None]:
    """Around imports that take seconds: a signal ends the program at once, as while it starts; then :func:`ready`."""
    if _begun:
        _leave_at_once(_begun[-1])
    try:
        yield
    finally:
        ready()


def _leave_at_once(program: str) -> None:
    def leave(number: int, frame: FrameType | None) -> NoReturn:
        os.write(2, f"{program}: {WORDS[number]} before anything began\n".encode())
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        _handle(number, leave)


def ready() -> None:
    """The work begins: Ctrl-C raises KeyboardInterrupt again, SIGTERM raises :class:`Terminated`, once."""
    if _begun:
        _handle(signal.SIGINT, signal.default_int_handler)
        _handle(signal.SIGTERM, _terminate)


def let_waiting_threads_sleep() -> None:
    """Choose for OpenMP, which reads its variables when torch loads it, unless the user chose any of them.

    A thread that spins takes the processor from the thread it waits for as soon as another process needs one too. How
    many threads there are stays as it is.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(WAITING)


def exit_stopped(program: str, stop: KeyboardInterrupt, what_is_kept: str) -> NoReturn:
    """Say who stopped ``program``, a person (130) or the system (143), what that means for results, and leave."""
    number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    print(f"{program}: {WORDS[number]}; {what_is_kept}", file=sys.stderr)
    raise SystemExit(128 + number)


def _handle(number: int, handler: Callable[..., Any]) -> None:
    if signal.getsignal(number) != signal.SIG_IGN:  # whoever started this wants it left alone, as nohup does
        signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut what the first one saves
    raise Terminated
