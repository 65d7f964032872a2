"""The image files of a folder, and the id that each of them keeps."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from priors.cards import sha256_of
from runs.checks import DataError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


class Known(NamedTuple):
    """What a run knows of a file: its id, and its checksum where it was reconstructed."""

    image_id: int
    sha256: str | None


def image_files(folder: Path, leave_out: Iterable[Path] = ()) -> list[Path]:
    """Image files below ``folder`` in natural order (``2.png`` before ``10.png``).

    Hidden files and folders, results of runs, and the folders ``leave_out`` are passed over.

    Raises:
        DataError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise DataError(f"data.dir={folder} is not a folder")
    own = {path.resolve() for path in leave_out}
    found = []
    for place, folders, files in os.walk(folder):
        here = Path(place)
        folders[:] = [n for n in folders if not n.startswith(".") and not _holds_results(here / n, own)]
        found += [here / n for n in files if not n.startswith(".") and Path(n).suffix.lower() in SUFFIXES]
    if not found:
        raise DataError(f"data.dir={folder} holds no image ({', '.join(sorted(SUFFIXES))})")
    return sorted(found, key=lambda path: _natural(path.relative_to(folder)))


def _holds_results(folder: Path, own: set[Path]) -> bool:
    """Is it one of ``own``, or the folder of a run?"""
    return folder.resolve() in own or ((folder / "config.yaml").is_file() and (folder / "records").is_dir())


def _natural(path: Path) -> tuple[list[object], str]:
    name = str(path)
    parts = re.split(r"(\d+)", name.lower())  # text and digits alternate
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], name  # the name itself parts 1.png and 01.png


def assign_ids(folder: Path, files: Sequence[Path], known: Mapping[str, Known]) -> dict[str, int]:
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
