"""``metrics.json``, schema 1, from the records of a run's images."""

from __future__ import annotations

import statistics
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any

from particledaps.evaluation.thresholds import THRESHOLDS
from particledaps.reports.comparison import estimate
from particledaps.settings.environment import git_commit, versions
from particledaps.settings.fingerprint import config_sha256
from particledaps.settings.schema import AUTO

SCHEMA = 1
METRICS = ("psnr", "ssim", "lpips")
HAS_RESULT = ("ok", "diverged")
"""States of images with numbers; the others failed, or their input could not be read."""
ALIGNMENTS = ("", "_aligned", "_channel_aligned")
"""As it is, after the best of the operator's symmetries, after the best combination of turned channels."""
MEASUREMENT_RANGES = {
    "phase_retrieval": "images in [0, 1] before the transform",
    "nonlinear_blur": "images in [-1, 1] (the network sees [0, 1])",
    "custom": "images in [-1, 1], as the operator takes them",
}

Record = dict[str, Any]


def build_metrics(records: list[Record], config: dict[str, Any]) -> dict[str, Any]:
    """``metrics.json``, schema 1, from finished records."""
    done = [r for r in records if r["state"] in HAS_RESULT]
    metrics = {"schema": SCHEMA, "metadata": metadata(done, config)}
    for name in METRICS:
        for suffix in ALIGNMENTS:
            metrics[name + suffix] = _metric(done, name + suffix, lower_is_better=name == "lpips")
    return metrics | {
        "modes": _modes(done),
        "inputs": {"per_image": [_input(r) for r in done]},
        "measurement": {"per_image": [{"image_id": r["image_id"], **r["measurement"]} for r in done]},
        "selection": _selection(done),
        "start": _per_image(done, "start"),
        "repulsion": _repulsion(done),
        "symmetry": _symmetry(done),
        "pruning": _per_image(done, "pruning"),
        "resampling": _per_image(done, "resampling"),
        "encoder": _per_image(done, "encoder"),
        "restarts": _restarts(done),
        "optimization": _per_image(done, "optimization"),
        "hooks": _own_hooks(done),
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
            "noise_sigma": None if kind == "custom" or task["noise_sigma"] == AUTO else task["noise_sigma"],
            "oversample": task["oversample"] if kind == "phase_retrieval" else None,
            "compat": config["compat"],
        },
        "versions": versions(),
        "git_commit": git_commit(),
        "config_sha256": config_sha256(config),
        "device": device,
        "environments": _environments(done),
        "gpu": {"peak_vram_mb": max(peaks, default=None)},
    }


def _environments(done: list[Record]) -> list[dict[str, Any]]:
    """What the images were computed with, an entry for each different one, and its image ids."""
    found: list[dict[str, Any]] = []
    for record in done:
        facts = record.get("environment")  # older records lack it
        same = next((row for row in found if row["facts"] == facts), None)
        if same is None:
            found.append({"facts": facts, "image_ids": [record["image_id"]]})
        else:
            same["image_ids"].append(record["image_id"])
    return found


def _input(record: Record) -> dict[str, Any]:
    source = record.get("input") or {"name": None, "sha256": None}  # older records lack it
    return {"image_id": record["image_id"], **source}


def mean(values: list[float]) -> float | None:
    """Mean, or None of nothing."""
    return estimate(values).mean


def std(values: list[float]) -> float | None:
    """Standard deviation with n - 1, or None below two values."""
    return statistics.stdev(values) if len(values) > 1 else None


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
    rows = [
        {"image_id": r["image_id"], "rounds": r["restarts"] or [], "end": r.get("restarts_end")}
        for r in done
        if r.get("restarts") or r.get("restarts_end")
    ]
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
        "coverage_mean": mean([float(r["coverage"]) for r in rows if r["coverage"] is not None]),
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


def _own_hooks(done: list[Record]) -> dict[str, Any]:
    """What hooks of the user's own logged, by name."""
    names = sorted({name for r in done for name in r.get("hooks") or {}})  # older records lack it

    def rows(name: str) -> list[dict[str, Any]]:
        return [{"image_id": r["image_id"], **r["hooks"][name]} for r in done if name in (r.get("hooks") or {})]

    return {name: {"per_image": rows(name)} for name in names}


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
        "per_image_cpu_seconds": [r["timing"].get("cpu_seconds") for r in done],  # older records lack it
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
