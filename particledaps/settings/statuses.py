"""Exit statuses of the programs, and what the disk said in words."""

from __future__ import annotations

from particledaps.names import shown

FAILED = 1
"""An image failed, or a training diverged."""
BAD_INPUT = 2
"""Input that cannot be used; nothing was begun."""
NOTHING = 3
"""Nothing came out of an image: every particle diverged."""
DISK = 4
"""Results cannot be written, or data cannot be read any more."""
SKIPPED = 5
"""An image was left out because it cannot be read."""
INTERRUPTED = 130
"""Ctrl-C."""
TERMINATED = 143
"""SIGTERM."""


class StoppedError(Exception):
    """A run cannot go on with its other images; the message says why."""


def disk_fault(error: OSError) -> str:
    """What the disk, or the system, refused."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    return f"the disk refuses: {reason}" + ("" if error.filename is None else f" ({shown(str(error.filename))})")
