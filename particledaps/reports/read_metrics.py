"""Reads ``metrics.json`` (schema 1) back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from particledaps.reports.comparison import Fingerprint
from particledaps.reports.finished_runs import METRICS, ImageResult, Phase, Quality, RepulsionRow, ResultsError, Run

SCHEMA = 1
CONVENTIONS = ("noise_sigma", "oversample", "measurement_range")


def read_run(path: Path) -> Run:
    """Read a ``metrics.json``, or the one in a run's folder.

    Raises:
        ResultsError: it is missing, no JSON, of another schema, or does not follow its schema.
    """
    file = path / "metrics.json" if path.is_dir() else path
    metrics = _load(file)
    schema = metrics.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        found = f"schema {schema!r}" if "schema" in metrics else "no schema (an older version or the research fork)"
        raise ResultsError(f"{file} has {found}; this tool reads schema {SCHEMA}")
    try:
        return _parse(metrics, str(path))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ResultsError(
            f"{file} says schema {SCHEMA} but does not follow it ({type(error).__name__}: {error})"
        ) from error


def _load(file: Path) -> dict[str, Any]:
    try:
        metrics = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except FileNotFoundError:
        there = file.parent.is_dir() and file.name == "metrics.json"
        raise ResultsError(f"{file.parent} holds no metrics.json" if there else f"{file} does not exist") from None
    except OSError as error:
        raise ResultsError(f"{file} cannot be read ({error.strerror})") from error
    except ValueError as error:  # not JSON, or not text
        raise ResultsError(f"{file} is not JSON ({error})") from error
    if not isinstance(metrics, dict):
        raise ResultsError(f"{file} holds a JSON {type(metrics).__name__}, not the object of a metrics.json")
    return metrics


def _parse(metrics: dict[str, Any], path: str) -> Run:
    meta = metrics["metadata"]
    timing = metrics["timing"]
    vram = metrics["vram"] or {}
    phases = {
        name: Phase(_number(p["seconds"]), p["steps"], _number(vram.get(f"{name}_peak_mb"), null=True))
        for name, p in timing["phases"].items()
    }
    rows = metrics["repulsion"]["per_step"]
    return Run(
        name=str(meta["name"]),
        path=path,
        config_sha256=meta["config_sha256"],
        conditions={k: meta["conventions"].get(k) for k in CONVENTIONS} | {"seed": meta["seed"]},
        num_samples=meta["num_samples"],
        images=_images(metrics, meta["image_ids"], timing),
        states={row["image_id"]: row["state"] for row in metrics["status"]["per_image"]},
        phases=phases,
        repulsion=[_repulsion_row(row) for row in rows],
    )


def _repulsion_row(row: dict[str, Any]) -> RepulsionRow:
    distance, ratio = (_number(row[key], null=True) for key in ("mean_pairwise_distance", "ratio"))
    return RepulsionRow(_number(row["t"]), distance, ratio)


def _images(metrics: dict[str, Any], ids: list[int], timing: dict[str, Any]) -> dict[int, ImageResult]:
    quality = {name: _by_id(metrics[name], ids) for name in METRICS if metrics[name] is not None}
    modes, measurement = _by_id(metrics["modes"], ids), _by_id(metrics["measurement"], ids)
    optimization, inputs = _by_id(metrics["optimization"], ids), _by_id(metrics.get("inputs"), ids)
    counted = timing.get("per_image_calls") or [None] * len(ids)
    computed = timing.get("per_image_cpu_seconds") or [None] * len(ids)  # older records lack it
    images = {}
    for image_id, seconds, calls, cpu in zip(ids, timing["per_image_seconds"], counted, computed, strict=True):
        mode, fit = modes.get(image_id, {}), measurement[image_id]
        work = optimization.get(image_id)
        images[image_id] = ImageResult(
            quality={name: _quality(rows[image_id]) for name, rows in quality.items()},
            solved=mode.get("solved"),
            coverage=_number(mode.get("coverage"), null=True),
            loss=[_number(v) for v in fit["loss"]],
            fingerprint=_fingerprint(fit),
            seconds=_number(seconds),
            cpu_seconds=_number(cpu, null=True),
            calls=None if calls is None else calls["decoder_gradient"],
            iterations=None if work is None else sum(work["iterations"]),
            source=inputs.get(image_id, {}).get("name"),
            sha256=inputs.get(image_id, {}).get("sha256"),
        )
    return images


def _by_id(section: dict[str, Any] | None, ids: list[int]) -> dict[int, dict[str, Any]]:
    """Rows by image id; rows without one follow ``image_ids``."""
    rows = section["per_image"] if section is not None else []
    return {row["image_id"] if "image_id" in row else ids[position]: row for position, row in enumerate(rows)}


def _quality(row: dict[str, Any]) -> Quality:
    samples = [_number(v) for v in row["samples"]]
    return Quality(samples, *(_number(row[key], null=True) for key in ("best", "mean", "std", "selected")))


def _fingerprint(row: dict[str, Any]) -> Fingerprint:
    found = row.get("fingerprint")
    mean_rms = None if found is None or None in found else (_number(found[0]), _number(found[1]))
    floor = _number(row["noise_floor"], null=True)
    return Fingerprint(mean_rms, math.inf if floor is None else floor)  # of an absurd measurement


def _number(value: Any, null: bool = False) -> Any:
    if (value is None and null) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    raise TypeError(f"{value!r} is no number")
