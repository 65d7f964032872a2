"""The image files of a folder, and the id that each of them keeps."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from particledaps.checks import DataError
from particledaps.checksums import sha256_of
from particledaps.names import shown

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"}
SUFFIXES |= {".jfif", ".tga", ".avif"}


class KnownFile(NamedTuple):
    """What a run knows of a file: its id, and its checksum where it was reconstructed."""

    image_id: int
    sha256: str | None


def image_files(folder: Path, leave_out: Iterable[Path] = ()) -> list[Path]:
    """Image files below ``folder``, also in linked folders, in natural order (``2.png`` before ``10.png``).

    Hidden files and folders, results of runs, and the folders ``leave_out`` are passed over.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    found = [path for path in _files(folder, leave_out) if path.suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(f"data.dir={folder} holds no image ({', '.join(sorted(SUFFIXES))})")
    return sorted(found, key=lambda path: _natural(path.relative_to(folder)))


def other_files(folder: Path, leave_out: Iterable[Path] = ()) -> str | None:
    """A sentence on the files that are no images by their names; None where there are none."""
    count = Counter(
        path.suffix.lower() or "without suffix"
        for path in _files(folder, leave_out)
        if path.suffix.lower() not in SUFFIXES
    )
    if not count:
        return None
    kinds = ", ".join(f"{number} {suffix}" for suffix, number in sorted(count.items())[:8])
    return f"left out, not read as images: {shown(kinds)} (convert pictures to PNG)"


def _files(folder: Path, leave_out: Iterable[Path]) -> list[Path]:
    """All files below a folder that are not hidden, each real folder once."""
    if not folder.is_dir():
        raise DataError(f"data.dir={folder} is not a folder")
    own = {path.resolve() for path in leave_out}
    seen, found = {folder.resolve()}, []
    for place, folders, files in os.walk(folder, followlinks=True):
        here, entered = Path(place), []
        for name in sorted(n for n in folders if not n.startswith(".")):
            real = (here / name).resolve()
            if real not in seen and not _holds_results(real, own):  # a link may lead back up
                seen.add(real)
                entered.append(name)
        folders[:] = entered
        found += [here / n for n in files if not n.startswith(".")]
    return found


def _holds_results(folder: Path, own: set[Path]) -> bool:
    """Is it one of ``own``, or the folder of a run?"""
    return folder in own or ((folder / "config.yaml").is_file() and (folder / "records").is_dir())


def _natural(path: Path) -> tuple[list[object], str]:
    name = str(path)
    parts = re.split(r"(\d+)", name.lower())  # text and digits alternate
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], name  # the name itself parts 1.png and 01.png


def assign_ids(folder: Path, files: Sequence[Path], known: Mapping[str, KnownFile]) -> dict[str, int]:
    """The id of every file, by its path below ``folder``: known files keep theirs, new ones get new ones.

    A file that was only renamed keeps its id. In a new run ids are positions in the natural order.

    Args:
        folder: the images' folder.
        files: below it, in natural order.
        known: what the run knows, by the same paths.
    """
    names = [path.relative_to(folder).as_posix() for path in files]
    ids = {name: known[name].image_id for name in names if name in known}
    gone = {k.sha256: k.image_id for name, k in known.items() if name not in ids and k.sha256 is not None}
    for path, name in zip(files, names, strict=True):
        if name not in ids and gone and (image_id := gone.pop(sha256_of(path), None)) is not None:
            ids[name] = image_id
    taken = {k.image_id for k in known.values()} | set(ids.values())
    fresh = [name for name in names if name not in ids]
    if not taken:
        return {name: position for position, name in enumerate(names)}
    first = max(taken) + 1
    return ids | {name: first + i for i, name in enumerate(fresh)}
