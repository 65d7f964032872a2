"""Results on disk: one record an image, ``metrics.json`` from all of them, resume."""

import json
import math
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml

from evaluation.modes import THRESHOLDS
from runs.checks import SettingsError
from runs.config_hash import NOT_IN_HASH, config_sha256

SCHEMA = 1
METRICS = ("psnr", "ssim", "lpips")
ALIGNMENTS = ("", "_aligned", "_channel_aligned")
"""As it is, after the best of the operator's symmetries, after the best combination of turned channels."""
PACKAGES = ("torch", "torchvision", "diffusers", "timm", "numpy", "piq", "hydra-core")
MEASUREMENT_RANGES = {
    "phase_retrieval": "images in [0, 1] before the transform",
    "nonlinear_blur": "images in [-1, 1] (the network sees [0, 1])",
    "custom": "images in [-1, 1], as the operator takes them",
}
ROOT = Path(__file__).resolve().parent.parent

Record = dict[str, Any]


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


def build_metrics(records: list[Record], config: dict[str, Any]) -> dict[str, Any]:
    """``metrics.json``, schema 1, from finished records."""
    done = [r for r in records if r["state"] != "failed"]
    metrics = {"schema": SCHEMA, "metadata": metadata(done, config)}
    for name in METRICS:
        for suffix in ALIGNMENTS:
            metrics[name + suffix] = _metric(done, name + suffix, lower_is_better=name == "lpips")
    return metrics | {
        "modes": _modes(done),
        "measurement": {"per_image": [{"image_id": r["image_id"], **r["measurement"]} for r in done]},
        "selection": _selection(done),
        "start": _per_image(done, "start"),
        "repulsion": _repulsion(done),
        "symmetry": _symmetry(done),
        "pruning": _per_image(done, "pruning"),
        "resampling": _per_image(done, "resampling"),
        "restarts": _restarts(done),
        "optimization": _per_image(done, "optimization"),
        "timing": _timing(done),
        "vram": _vram(done),
        "status": {
            "per_image": [{k: r[k] for k in ("image_id", "state", "diverged_particles", "error")} for r in records]
        },
    }


def metadata(done: list[Record], config: dict[str, Any]) -> dict[str, Any]:
    """Who, what, where and with which versions."""
    peaks = [p for r in done for p in r["vram"].values() if p is not None]
    device = done[-1]["device"] if done else {"type": None, "name": None}
    counts = [len(r["particle_ids"]) for r in done]
    task, kind = config["task"], config["task"]["kind"]
    return {
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": config["name"],
        "seed": config["seed"],
        "num_images": len(done),
        "image_ids": [r["image_id"] for r in done],
        "num_samples": config["num_samples"],
        "num_samples_final": max(counts, default=0),
        "hyperparameters": {k: v for k, v in config.items() if k not in ("name", "save_dir", "device", "gpu", "data")},
        "conventions": {
            "measurement_range": MEASUREMENT_RANGES.get(kind, "images in [-1, 1]"),
            "loss": "sum of squared residuals over every entry of y",
            "tau": done[-1]["tau"] if done else None,
            "noise_sigma": None if kind == "custom" else task["noise_sigma"],  # a custom operator has its own
            "oversample": task["oversample"] if kind == "phase_retrieval" else None,
            "compat": config["compat"],
        },
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "git_commit": git_commit(),
        "config_sha256": config_sha256(config),
        "device": device,
        "gpu": {"peak_vram_mb": max(peaks, default=None)},
    }


def git_commit() -> str | None:
    """Commit of this checkout, or None."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def mean(values: list[float]) -> float | None:
    """Mean, or None of nothing."""
    return sum(values) / len(values) if values else None


def std(values: list[float]) -> float | None:
    """Standard deviation with n - 1, or None below two values."""
    return torch.tensor(values, dtype=torch.float64).std().item() if len(values) > 1 else None


def _metric(done: list[Record], name: str, lower_is_better: bool) -> dict[str, Any] | None:
    if not done or any(r["metrics"] is None or name not in r["metrics"] for r in done):
        return None
    best_of = min if lower_is_better else max
    rows = []
    for record in done:
        samples, ids = record["metrics"][name], record["particle_ids"]
        best = best_of(range(len(samples)), key=samples.__getitem__) if samples else None
        rows.append(
            {
                "image_id": record["image_id"],
                "particle_ids": ids,
                "samples": samples,
                "mean": mean(samples),
                "std": std(samples),
                "best": None if best is None else samples[best],
                "best_particle": None if best is None else ids[best],
                "selected": record["selected"][name] if record["selected"] else None,
            }
        )
    scored = [r for r in rows if r["samples"]]
    bests, means = [r["best"] for r in scored], [r["mean"] for r in scored]
    overall = {
        "best_mean": mean(bests),
        "best_std": std(bests),
        "mean_of_means": mean(means),
        "std_of_means": std(means),
        "selected_mean": mean([r["selected"] for r in scored]),
    }
    return {"per_image": rows, "overall": overall}


def _restarts(done: list[Record]) -> dict[str, Any] | None:
    rows = [{"image_id": r["image_id"], "rounds": r["restarts"]} for r in done if r.get("restarts")]
    return {"per_image": rows} if rows else None


def _selection(done: list[Record]) -> dict[str, Any]:
    rows = [r for r in done if r["selection"]]
    regrets = [(r["selected"] or {}).get("regret_db") for r in rows]
    return {
        "per_image": [
            {"image_id": r["image_id"], **r["selection"], "regret_db": regret}
            for r, regret in zip(rows, regrets, strict=True)
        ],
        "overall": {"regret_mean": mean([regret for regret in regrets if regret is not None])},
    }


def _modes(done: list[Record]) -> dict[str, Any] | None:
    rows = [{"image_id": r["image_id"], **r["modes"]} for r in done if r["modes"] is not None]
    if not rows:
        return None
    shares = [mean([float(s) for s in r["solved"]]) for r in rows if r["solved"]]
    overall = {
        "success_rate": mean([float(any(r["solved"])) for r in rows]),
        "particle_success_rate": mean(shares),
        "coverage_mean": mean([float(r["coverage"]) for r in rows]),
    }
    return {"per_image": rows, "overall": overall, "thresholds": THRESHOLDS}


def _repulsion(done: list[Record]) -> dict[str, Any]:
    parts = [(r["image_id"], r["repulsion"]) for r in done if "repulsion" in r]  # older records lack it
    return {
        "enabled": any(part["enabled"] for _, part in parts),
        "features": parts[0][1]["features"] if parts else None,
        "kernel": parts[0][1]["kernel"] if parts else None,
        "active_steps": max((part["active_steps"] for _, part in parts), default=0),
        "seconds": sum((part["seconds"] for _, part in parts), 0.0),
        "per_step": [{"image_id": i, **row} for i, part in parts for row in part["per_step"]],
    }


def _symmetry(done: list[Record]) -> dict[str, Any]:
    parts = [(r["image_id"], r["symmetry"]) for r in done if r.get("symmetry") is not None]  # older records lack it
    return {
        "moves": parts[0][1]["moves"] if parts else [],
        "seconds": sum((part["seconds"] for _, part in parts), 0.0),
        "per_image": [{"image_id": i, **row} for i, part in parts for row in part["tries"]],
    }


def _per_image(done: list[Record], name: str) -> dict[str, Any]:
    return {"per_image": [{"image_id": r["image_id"], **r[name]} for r in done if r.get(name) is not None]}


def _timing(done: list[Record]) -> dict[str, Any]:
    steps = [r["timing"]["per_step_seconds"] for r in done]
    phases: dict[str, dict[str, float]] = {}
    for record in done:
        for name, phase in record["timing"]["phases"].items():
            total = phases.setdefault(name, {"seconds": 0.0, "steps": 0})
            total["seconds"] += phase["seconds"]
            total["steps"] += phase["steps"]
    return {
        "total_seconds": sum(r["timing"]["seconds"] for r in done),
        "per_image_seconds": [r["timing"]["seconds"] for r in done],
        "per_image_calls": [r["timing"].get("calls") for r in done],
        "per_step_seconds": [mean([s for s in column if s is not None]) for column in zip_longest(*steps)],
        "phases": phases or {"sampling": {"seconds": 0.0, "steps": 0}},
    }


def _vram(done: list[Record]) -> dict[str, float | None] | None:
    peaks: dict[str, float | None] = {}
    for record in done:
        for name, peak in record["vram"].items():
            key = f"{name}_peak_mb"
            both = [p for p in (peak, peaks.get(key)) if p is not None]
            peaks[key] = max(both, default=None)  # a phase of no length has none
    return peaks if any(p is not None for p in peaks.values()) else None
