"""Several processes in one folder: each image is claimed by one of them while it works on it.

A claim is a small file that says who holds it. It is free again when its holder gives it back, at once when the holder
was a process of this machine that is gone, and, for holders on other machines, once it has not been renewed for
:data:`STALE_SECONDS`.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from particledaps.files import write_atomically

RENEW_SECONDS = 30.0
STALE_SECONDS = 300.0
LOCK = ".lock"


@dataclass(frozen=True)
class Holder:
    """A process that holds a claim.

    Attributes:
        host: name of its machine.
        boot: what tells this start of the machine, and the process's view of it, from others; empty if unknown.
        pid: its number.
        started: its start time in the machine's clock ticks; 0 if unknown.
        token: of this claim, never used twice.
    """

    host: str
    boot: str
    pid: int
    started: int
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> Holder:
    """This process with a new token."""
    pid = os.getpid()
    _, started = _process(pid)
    return Holder(socket.gethostname(), _boot(), pid, started, secrets.token_hex(8))


class Claim:
    """A claim that this process holds; renewed by a thread until it is given back."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self.path, self.holder = path, holder
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            if read_holder(self.path) != self.holder:  # it was stale for others, who took it
                return
            os.utime(self.path)

    def give_back(self) -> None:
        """Let others have it."""
        self._over.set()
        self._thread.join()
        if read_holder(self.path) == self.holder:
            self.path.unlink(missing_ok=True)


def take(path: Path) -> Claim | Holder | None:
    """Claim ``path``, or learn who holds it (None: somebody who has not said so yet).

    Raises:
        OSError: the folder cannot be written.
    """
    mine = this_process()
    while not _create(path, mine):
        with folder_lock(path.parent):  # one at a time, so that two do not take a dead one's claim from each other
            holder = read_holder(path)
            if not path.exists():  # given back this moment
                continue
            if not is_stale(path, holder):
                return holder
            write_atomically(path, json.dumps(asdict(mine)))
            break
    return Claim(path, mine)


def _create(path: Path, mine: Holder) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(asdict(mine)))
    except BaseException:  # Ctrl-C too: an empty claim would be nobody's
        path.unlink(missing_ok=True)
        raise
    return True


def give_back_all(folder: Path) -> None:
    """Claims of this process in ``folder`` that an interruption has left."""
    here = this_process()
    for path in folder.glob("*.claim"):
        holder = read_holder(path)
        if holder is not None and replace(holder, token=here.token) == here:
            path.unlink(missing_ok=True)


def read_holder(path: Path) -> Holder | None:
    """Who holds a claim; None where there is none, or it cannot be read (yet)."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def is_stale(path: Path, holder: Holder | None) -> bool:
    """Whether a claim's holder is gone."""
    here = this_process()
    if holder is not None and here.boot and (holder.host, holder.boot) == (here.host, here.boot):
        alive, started = _process(holder.pid)
        return not (alive and started == holder.started)
    try:
        return clock_of(path.parent) - path.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:
        return True


def clock_of(folder: Path) -> float:
    """The time by the file system of ``folder``, which other machines' claims are dated by."""
    probe = folder / f".clock.{os.getpid()}.{secrets.token_hex(4)}"
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """One process at a time in the block, where the file system has locks."""
    with open(folder / LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            yield
            return
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def _boot() -> str:
    """This start of this machine and this process's table of processes; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "/" + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _process(pid: int) -> tuple[bool, int]:
    """Whether a process of this machine runs (one that ended but was not waited for does not), and its start time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return False, 0
    return fields[0] not in "ZX", int(fields[19])
