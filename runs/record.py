"""Results on disk: one record an image, ``metrics.json`` from all of them, resume."""

import json
import math
import os
from pathlib import Path
from typing import Any

import yaml

from runs.checks import SettingsError
from runs.config_hash import NOT_IN_HASH, config_sha256
from runs.metrics_file import Record, build_metrics


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def finite(value: Any) -> Any:
    """The same structure with NaN and infinities as None, so that it is JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


class RunFolder:
    """``<save_dir>/<name>`` with its configuration, records and pictures.

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
        self._check()

    def _check(self) -> None:
        existing = self.path / "config.yaml"
        if existing.exists():
            theirs = _read_config(existing)
            if config_sha256(theirs) != config_sha256(self.config):
                changed = _changed_keys(theirs, self.config)
                raise SettingsError(
                    f"{self.path} holds a run with another configuration (it differs in {', '.join(changed[:6])}); "
                    "choose another name= or save_dir=, or remove that folder"
                )
        probe = self.path
        while not probe.exists():
            probe = probe.parent
        if not probe.is_dir() or not os.access(probe, os.W_OK):
            raise SettingsError(f"save_dir: cannot write to {self.path} ({probe} is not a writable folder)")

    def open(self) -> None:
        """Create the folder and write ``config.yaml``; called once everything else has loaded."""
        try:
            for sub in self.SUBFOLDERS:
                (self.path / sub).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(f"save_dir: cannot write to {self.path}: {error.strerror}") from error
        write_atomically(self.path / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))

    def has(self, image_id: int) -> bool:
        """Is this image finished (a failed one is tried again)?"""
        path = self._record_path(image_id)
        return path.exists() and json.loads(path.read_text())["state"] != "failed"

    def save(self, record: Record) -> None:
        """Write one image's record atomically, then ``metrics.json``."""
        write_atomically(self._record_path(record["image_id"]), json.dumps(finite(record), indent=1))
        self.save_metrics()

    def floats_path(self, image_id: int) -> Path:
        """Where the measurement and the float estimates of an image lie."""
        return self.path / "floats" / f"{image_id:05d}.npz"

    def records(self) -> list[Record]:
        """All records, by image id."""
        found = [json.loads(p.read_text()) for p in (self.path / "records").glob("*.json")]
        return sorted(found, key=lambda r: r["image_id"])

    def save_metrics(self) -> dict[str, Any]:
        """Write and return ``metrics.json``."""
        metrics = build_metrics(self.records(), self.config)
        write_atomically(self.path / "metrics.json", json.dumps(finite(metrics), indent=1, allow_nan=False) + "\n")
        return metrics

    def _record_path(self, image_id: int) -> Path:
        return self.path / "records" / f"{image_id:05d}.json"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("data"), dict):
        raise SettingsError(
            f"{path} is not the configuration of a run; choose another name= or save_dir=, or remove that folder"
        )
    return config


def _changed_keys(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in sorted(set(theirs) | set(ours)):
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += _changed_keys(a, b, f"{prefix}{key}.")
        elif a != b and key not in (*NOT_IN_HASH, "start_id", "end_id"):
            changed.append(f"{prefix}{key}")
    return changed
