"""``metrics.json`` with numbers that a person can check, and the tool's CSV read back."""

import csv
import io

import numpy as np

SHA = "a" * 64
HYPER = dict.fromkeys(
    [
        *("repulsion_scale", "repulsion_sigma_break", "repulsion_schedule", "repulsion_dino_model"),
        *("pruning_step", "optimization_step", "seed", "sampler"),
    ]
)
PHASES = {"pre_optimization": (6.0, 8, 500.0), "optimization": (2.0, 2, 900.0)}


def quality(image_id, samples, selected=0, lower=False):
    ids = list(range(len(samples)))
    if not samples:
        empty = dict.fromkeys(("mean", "std", "best", "best_particle", "selected"))
        return {"image_id": image_id, "particle_ids": [], "samples": [], **empty}
    best = (min if lower else max)(ids, key=samples.__getitem__)
    return {
        "image_id": image_id,
        "particle_ids": ids,
        "samples": samples,
        "mean": sum(samples) / len(samples),
        "std": float(np.std(samples, ddof=1)) if len(samples) > 1 else None,
        "best": samples[best],
        "best_particle": best,
        "selected": samples[selected],
    }


def metric(rows, lower=False):
    """Overall values are noise: the tool must not use them, since they do not survive a join."""
    overall = dict.fromkeys(("best_mean", "best_std", "mean_of_means", "std_of_means", "selected_mean"), -99.0)
    return {"per_image": [quality(i, samples, lower=lower) for i, samples in rows], "overall": overall}


def modes(rows):
    per_image = [
        {
            "image_id": i,
            "labels": ["0" if v > 18 else "mixed" for v in samples],
            "coverage": int(any(v > 18 for v in samples)),
            "twin_fit": [{"a": 1.0, "b": 0.0} for _ in samples],
            "solved": [v > 18 for v in samples],
        }
        for i, samples in rows
    ]
    rates = dict.fromkeys(("success_rate", "particle_success_rate", "coverage_mean"), -99.0)
    return {"per_image": per_image, "overall": rates}


def measurement(image_id, samples, losses):
    loss = losses[: len(samples)]
    excess = [v - 70.0 - image_id for v in loss]
    floor = {"noise_floor": 70.0 + image_id, "noise_floor_std": 0.4, "excess": excess}
    return {"image_id": image_id, "loss": loss, **floor, "fingerprint": [0.07 + image_id, 0.4 + image_id]}


def repulsion(distances):
    rows = [
        {"image_id": i, "step": s, "sigma": 1.0, "t": t, "scale": 0.1, "mean_pairwise_distance": d}
        | {"repulsion_norm": 0.1, "score_norm": 1.0, "ratio": d / 100}
        for i, values in distances.items()
        for s, (t, d) in enumerate(zip((1000.0, 500.0), values, strict=True))
    ]
    return {"enabled": bool(rows), "active_steps": 2 * bool(rows), "seconds": 0.0, "per_step": rows}


def timing(seconds, phases):
    return {
        "total_seconds": sum(seconds),
        "per_image_seconds": seconds,
        "per_step_seconds": [],
        "phases": {name: {"seconds": s, "steps": n} for name, (s, n, _) in phases.items()},
    }


def hand_made(psnr, name="exp", truth=True, seconds=4.0, losses=(75.0, 76.0), iterations=None, distances=None):
    """A file of schema 1; ``psnr`` is image id -> samples, aligned PSNR is 1 dB and SSIM 1/100 of it."""
    phases = PHASES if iterations else {"sampling": (8.0, 10, None)}
    rows, ids = list(psnr.items()), list(psnr)
    aligned, ssim = [(i, [v + 1 for v in s]) for i, s in rows], [(i, [v / 100 for v in s]) for i, s in rows]
    values = {"psnr": rows, "psnr_aligned": aligned, "ssim": ssim, "ssim_aligned": ssim}
    work = [{"image_id": i, "iterations": iterations} for i in ids] if iterations else []
    fields = dict.fromkeys(("seconds", "initial_loss", "final_loss", "reason", "accepted"))
    peaks = {f"{n}_peak_mb": p for n, (_, _, p) in phases.items() if p is not None}
    states = [{"image_id": i, "state": "ok" if s else "diverged", "error": None} for i, s in rows]
    return {
        "schema": 1,
        "metadata": {
            "timestamp": "2026-01-01T00:00:00+00:00",
            "name": name,
            "seed": 42,
            "num_images": len(ids),
            "image_ids": ids,
            "num_samples": 2,
            "num_samples_final": 2,
            "hyperparameters": HYPER,
            "conventions": {"measurement_range": "unit", "loss": "sum", "tau": 0.1}
            | {"noise_sigma": 0.05, "oversample": 2.0, "compat": {}},
            "versions": {"python": "3.11", "torch": "2"},
            "git_commit": None,
            "config_sha256": SHA,
            "device": {"type": "cpu", "name": None},
            "environments": [{"facts": None, "image_ids": ids}],
            "gpu": {"peak_vram_mb": max(peaks.values(), default=None)},
        },
        **{key: metric(value) if truth else None for key, value in values.items()},
        "lpips": None,
        "lpips_aligned": None,
        "modes": modes(rows) if truth else None,
        "inputs": {"per_image": [{"image_id": i, "name": None, "sha256": None} for i, _ in rows]},
        "measurement": {"per_image": [measurement(i, s, list(losses)) for i, s in rows]},
        "selection": {
            "per_image": [
                {"image_id": i, "selected_particle": 0, "symmetry": "identity", "rule": "r", "scores": [0.0] * len(s)}
                for i, s in rows
                if s
            ]
        },
        "repulsion": repulsion(distances or {}),
        "pruning": {"per_image": []},
        "optimization": {"per_image": [row | fields for row in work]},
        "timing": timing([seconds] * len(ids), phases),
        "vram": peaks or None,
        "status": {"per_image": [s | {"diverged_particles": [] if psnr[s["image_id"]] else [0, 1]} for s in states]},
    }


TWO = hand_made({0: [20.0, 10.0], 1: [26.0, 30.0]}, iterations=[3, 4], distances={0: [1.0, 2.0], 1: [3.0, 6.0]})
DIVERGED = hand_made({0: [20.0, 10.0], 1: [], 2: [26.0, 30.0]}, name="hurt")


def csv_rows(text):
    return [{k: _number(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(text))]


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text or None
