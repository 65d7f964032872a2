"""Files that appear whole or not at all, and folders without links."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".tmp"


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[Path]:
    """A temporary file that takes the place of ``path``, whole, once the block has ended.

    Every writer has a temporary file of its own, with the suffix of ``path``. If the block fails ``path`` stays as it
    was. A link at ``path`` is replaced, never followed; a folder there steps aside, with all that is in it.

    Args:
        path: the file.
        durable: wait until it is on the disk. Pictures need not be: a record knows their sizes, and a loss of power
            that cuts one is noticed.
    """
    unique = f"{os.getpid()}.{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.stem}.{unique}{TEMPORARY}{path.suffix}")
    try:
        yield temporary
        if durable:
            _flush(temporary)
        if path.is_dir() and not path.is_symlink():
            path.rename(path.with_name(f"{path.name}.{unique}.aside"))
        os.replace(temporary, path)
        if durable:
            _flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def _flush(path: Path) -> None:
    """Have a file, or the names in a folder, written to the disk; some file systems cannot do so for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def links_below(folder: Path) -> list[Path]:
    """Symbolic links in ``folder`` and its subfolders, which are not entered."""
    found = []
    for place, folders, files in os.walk(folder):
        found += [path for name in (*folders, *files) if (path := Path(place) / name).is_symlink()]
    return sorted(found)


def remove_abandoned(folder: Path, older_than: float) -> None:
    """Remove temporary files of :func:`replacing` below ``folder`` that were last written before ``older_than``.

    Args:
        folder: of a run.
        older_than: modification time in seconds, by the clock of the file system.
    """
    for path in folder.rglob(f".*{TEMPORARY}*"):
        try:
            if path.lstat().st_mtime < older_than:
                path.unlink()
        except FileNotFoundError:  # another process was faster
            continue
