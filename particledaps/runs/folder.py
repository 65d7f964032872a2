"""Results on disk: one record an image, ``metrics.json`` from all of them, resume; several processes may share them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from particledaps.checks import SettingsError
from particledaps.checksums import sha256_of
from particledaps.data.image_folder import KnownFile
from particledaps.files import links_below, remove_abandoned, write_atomically
from particledaps.reports.write_metrics import Record, build_metrics
from particledaps.runs.claims import STALE_SECONDS, Claim, Holder, clock_of, folder_lock, give_back_all, take
from particledaps.settings.fingerprint import changed_keys, config_sha256
from particledaps.settings.stored_config import dump_config, read_config

__all__ = ["RunFolder", "finite", "write_atomically"]
RECORD_NAME = re.compile(r"\d{5,}\.json")
STATES = ("ok", "diverged", "failed", "skipped")
SUMMARY = ("image_id", "name", "state", "error", "input", "environment", "prior_sha256", "files")
METRICS_SHARE = 0.05
"""``metrics.json`` is made of all records: between two times so much of the time goes into it at most."""
FileState = tuple[int, int, int]
NO_CONFIG = {
    "name": "",
    "seed": 0,
    "num_samples": 0,
    "compat": {},
    "data": {},
    "task": {"kind": "", "noise_sigma": 0.0, "oversample": 0.0},
}
"""Enough of a configuration to see whether a record has what metrics.json is made of."""


def finite(value: Any) -> Any:
    """The same structure with NaN and infinities as None, so that it is JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


class RunFolder:
    """``<save_dir>/<name>`` with its configuration, records and pictures.

    It belongs to one identity (:mod:`particledaps.settings.fingerprint`). Several processes of it may work in it: each
    image is claimed by one of them.

    Args:
        save_dir: folder of all results.
        name: name of the run.
        config: the fully merged configuration.

    Raises:
        SettingsError: the folder cannot be written, or holds results of another configuration.
    """

    SUBFOLDERS = ("records", "samples", "trajectory", "floats", "sheets")

    def __init__(self, save_dir: str, name: str, config: dict[str, Any]) -> None:
        self.path, self.config = Path(save_dir) / name, config
        self._read: dict[str, tuple[FileState, Record | None]] = {}
        self._metrics_due, self.clock = 0.0, time.monotonic
        self._check()

    def _check(self) -> None:
        if self.is_begun:
            self._check_identity()
        probe = self.path
        while not probe.exists():
            probe = probe.parent
        if not probe.is_dir() or not os.access(probe, os.W_OK):
            raise SettingsError(f"save_dir: cannot write to {self.path} ({probe} is not a writable folder)")
        if links := links_below(self.path):
            raise SettingsError(
                f"{links[0]} is a link, and what it leads to would be overwritten: remove it, or choose another name="
            )

    @property
    def is_begun(self) -> bool:
        """Has a run been started here?"""
        return (self.path / "config.yaml").exists()

    def _check_identity(self) -> None:
        theirs = read_config(self.path / "config.yaml")
        if config_sha256(theirs) != config_sha256(self.config):
            changed = changed_keys(theirs, self.config)
            raise SettingsError(
                f"{self.path} holds a run with another configuration (it differs in {', '.join(changed[:6])}); "
                "choose another name= or save_dir=, or remove that folder"
            )

    def open(self) -> None:
        """Create the folder and write ``config.yaml``; called once everything else has loaded.

        Raises:
            SettingsError: files are in the way, or a run of another configuration was faster.
            OSError: it cannot be written.
        """
        try:
            for sub in self.SUBFOLDERS:
                (self.path / sub).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise SettingsError(
                f"save_dir: cannot write to {self.path}: {error.strerror} ({error.filename})"
            ) from error
        with folder_lock(self.path):
            self._check()
            write_atomically(self.path / "config.yaml", dump_config(self.config))
        remove_abandoned(self.path, clock_of(self.path) - STALE_SECONDS)

    def keep_once(self, name: str, text: str, is_there: Callable[[], bool]) -> None:
        """Write a file of the run, unless another process of it was faster: all processes read the same.

        Args:
            name: of the file.
            text: its text.
            is_there: does the file that is there count?

        Raises:
            OSError: it cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.path):
            if not is_there():
                write_atomically(self.path / name, text)

    @contextmanager
    def claim(self, image_id: int) -> Iterator[Holder | bool | None]:
        """Work on an image alone: yields True, or, without waiting, who works on it (None: it is not known)."""
        taken = take(self.path / "records" / f"{image_id:05d}.claim")
        if not isinstance(taken, Claim):
            yield taken
            return
        try:
            yield True
        finally:
            taken.give_back()

    def give_back_claims(self) -> None:
        """Leave no claim behind, whatever ended the work."""
        give_back_all(self.path / "records")

    def known_files(self, names: Sequence[str]) -> dict[str, KnownFile]:
        """Ids and checksums of the files of this run's folder of images, by their paths below it.

        Args:
            names: paths of the files that are there now, in natural order.
        """
        table, records = self._table(), {r["image_id"]: r for r in self.summaries()}
        sums = {i: (r.get("input") or {}).get("sha256") for i, r in records.items()}
        if table is None:  # stored before there was a table: a record's name is a file's without its suffix
            table = {}
            for image_id, record in records.items():
                fitting = [n for n in names if Path(n).stem == record.get("name")]
                own = [n for n in fitting if names.index(n) == image_id]
                table |= {n: image_id for n in (own or fitting or [record.get("name")])[:1]}
        return {name: KnownFile(image_id, sums.get(image_id)) for name, image_id in table.items()}

    def keep_files(self, ids: dict[str, int]) -> None:
        """Write down the id of every file, for all later runs in this folder.

        Raises:
            SettingsError: another process has given other ids meanwhile.
        """
        with folder_lock(self.path):
            table = self._table() or {}
            if any(table.get(name, image_id) != image_id for name, image_id in ids.items()):
                raise SettingsError(
                    f"{self.path}: another process met other files in data.dir at this moment; start this one again"
                )
            if ids.keys() - table.keys():
                text = json.dumps(dict(sorted((table | ids).items(), key=lambda item: item[1])), indent=1)
                write_atomically(self.path / "images.json", text)

    def _table(self) -> dict[str, int] | None:
        table = _read_json(self.path / "images.json")
        return table if isinstance(table, dict) and all(type(i) is int for i in table.values()) else None

    def summary(self, image_id: int) -> Record | None:
        """What going on needs of an image's record; None where there is none that can be read and is this image's."""
        return self._summary(self._record_path(image_id))

    def summaries(self) -> list[Record]:
        """The same of all records, by image id."""
        found = (self._summary(path) for path in self.record_files())
        return sorted((r for r in found if r is not None), key=lambda r: r["image_id"])

    def set_aside(self, image_id: int) -> None:
        """A record counts no more; it stays beside the others, under another name."""
        path = self._record_path(image_id)
        os.replace(path, path.with_suffix(".replaced"))

    def save(self, record: Record) -> None:
        """Write one image's record; ``metrics.json`` follows where that costs little beside what the run does."""
        self.save_numbers(record)
        if (started := self.clock()) >= self._metrics_due:
            self.save_metrics()
            ended = self.clock()
            self._metrics_due = ended + (ended - started) / METRICS_SHARE

    def save_numbers(self, record: Record) -> None:
        """Write one image's record atomically, with a checksum of its own."""
        plain = json.loads(json.dumps(finite({k: v for k, v in record.items() if k != "checksum"})))
        text = json.dumps(plain | {"checksum": _checksum(plain)}, indent=1)
        write_atomically(self._record_path(record["image_id"]), text)

    def describe(self, paths: Sequence[Path]) -> dict[str, list[int | str]]:
        """Size and checksum of files of this run, by their paths below its folder."""
        return {p.relative_to(self.path).as_posix(): [p.stat().st_size, sha256_of(p)] for p in paths}

    def damaged_files(self, record: Record) -> list[Path]:
        """Files of a record that have another size than when they were written; those that were removed are not."""
        known = (record.get("files") or {}).items()
        states = ((self.path / name, size, _file_state(self.path / name)) for name, (size, _) in known)
        return [path for path, size, state in states if state is not None and state[2] != size]

    def floats_path(self, image_id: int) -> Path:
        """Where the measurement and the float estimates of an image lie."""
        return self.path / "floats" / f"{image_id:05d}.npz"

    def record_files(self) -> list[Path]:
        """The files of records, by name; whatever else lies there is passed over."""
        return sorted(p for p in (self.path / "records").glob("*.json") if RECORD_NAME.fullmatch(p.name))

    def records(self) -> list[Record]:
        """All records that can be read, by image id."""
        found = (_read_json(path) for path in self.record_files() if self._summary(path) is not None)
        return sorted((r for r in found if r is not None), key=lambda r: r["image_id"])

    def damaged(self) -> list[Path]:
        """Files of records that count as not there."""
        return [path for path in self.record_files() if self._summary(path) is None]

    def save_metrics(self) -> dict[str, Any]:
        """Write and return ``metrics.json``, again if another process saved a record meanwhile."""
        while True:
            before = self._state_of_records()
            metrics = build_metrics(self.records(), self.config)
            write_atomically(self.path / "metrics.json", json.dumps(finite(metrics), indent=1, allow_nan=False) + "\n")
            if self._state_of_records() == before:
                return metrics

    def _state_of_records(self) -> list[tuple[str, FileState | None]]:
        return [(path.name, _file_state(path)) for path in self.record_files()]

    def _summary(self, path: Path) -> Record | None:
        """Read and check a record once, and remember what matters of it as long as its file stays the same."""
        state = _file_state(path)
        if state is None:
            return None
        known = self._read.get(path.name)
        if known is None or known[0] != state:
            record = _read_record(path)
            known = self._read[path.name] = (state, None if record is None else _summarise(record))
        return known[1]

    def _record_path(self, image_id: int) -> Path:
        return self.path / "records" / f"{image_id:05d}.json"


def _file_state(path: Path) -> FileState | None:
    """What changes when a file does; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def _read_record(path: Path) -> Record | None:
    """A whole record whose id is its file's: a copy of another's record is none."""
    record = _read_json(path)
    if not isinstance(record, dict) or record.get("state") not in STATES:
        return None
    own = type(record.get("image_id")) is int and path.name == f"{record['image_id']:05d}.json"
    return record if own and _is_whole(record) else None


def _summarise(record: Record) -> Record:
    fingerprint = (record.get("measurement") or {}).get("fingerprint")
    return {k: record[k] for k in SUMMARY if k in record} | {"measurement": {"fingerprint": fingerprint}}


def _is_whole(record: Record) -> bool:
    if "checksum" in record:
        return record["checksum"] == _checksum({k: v for k, v in record.items() if k != "checksum"})
    try:  # stored before records had checksums
        build_metrics([record], NO_CONFIG)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return False
    return True


def _checksum(record: Record) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
