"""``metrics.json`` against its description (METRICS.md, schema 1), without a schema library."""

import json
import math
from pathlib import Path

METRICS = ("psnr", "ssim", "lpips", "psnr_aligned", "ssim_aligned", "lpips_aligned")
LABELS = {"0", "180", "mixed", "none", "symmetric"}
STATES = {"ok", "diverged", "failed", "skipped"}
PHASES = (
    {"sampling"},
    {"pre_pruning", "post_pruning"},
    {"pre_optimization", "optimization"},
    {"pre_pruning", "post_pruning_pre_optimization", "optimization"},
)


def load(path):
    """Read and check one file."""
    metrics = json.loads(Path(path).read_text(), parse_constant=lambda name: fail("file", f"{name} is not JSON"))
    check(metrics)
    return metrics


def fail(where, what):
    raise AssertionError(f"{where}: {what}")


def need(holds, where, what):
    if not holds:
        fail(where, what)


def keys(value, where, *names):
    need(isinstance(value, dict), where, f"an object, not {type(value).__name__}")
    missing = [n for n in names if n not in value]
    need(not missing, where, f"lacks {missing}")


def number(value, where, null=False):
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    need((null and value is None) or (plain and math.isfinite(value)), where, f"{value!r} is no number")


def integer(value, where, null=False):
    whole = isinstance(value, int) and not isinstance(value, bool)
    need((null and value is None) or whole, where, f"{value!r} is no integer")


def text(value, where, null=False):
    need((null and value is None) or isinstance(value, str), where, f"{value!r} is no string")


def listed(value, where, item, length=None):
    need(isinstance(value, list), where, f"a list, not {type(value).__name__}")
    need(length is None or len(value) == length, where, f"{len(value)} entries, not {length}")
    for position, entry in enumerate(value):
        item(entry, f"{where}[{position}]")


def check(metrics):
    """Raise AssertionError where ``metrics`` breaks the schema."""
    top = ("schema", "metadata", *METRICS, "modes", "inputs", "measurement", "selection", "repulsion", "pruning")
    keys(metrics, "metrics", *top, "optimization", "timing", "vram", "status")
    need(metrics["schema"] == 1, "schema", metrics["schema"])
    check_metadata(metrics["metadata"])
    ids = metrics["metadata"]["image_ids"]
    particles = check_measurement(metrics["measurement"], ids)
    need([r["image_id"] for r in metrics["inputs"]["per_image"]] == ids, "inputs", "does not follow image_ids")
    for name in METRICS:
        if metrics[name] is not None:
            check_quality(metrics[name], name, ids, particles)
    have = {metrics[name] is not None for name in ("psnr", "ssim", "psnr_aligned", "ssim_aligned", "modes")}
    need(len(have) == 1, "psnr..modes", "all or none of them are null")
    need((metrics["lpips"] is None) == (metrics["lpips_aligned"] is None), "lpips", "both or none are null")
    if metrics["modes"] is not None:
        check_modes(metrics["modes"], ids, particles)
    check_selection(metrics["selection"], particles)
    check_hooks(metrics)
    check_timing(metrics["timing"], len(ids))
    check_vram(metrics["vram"], metrics["timing"]["phases"], metrics["metadata"])
    check_status(metrics["status"], ids, particles, metrics["metadata"]["num_samples"])


def check_metadata(meta):
    names = ("timestamp", "name", "seed", "num_images", "image_ids", "num_samples", "num_samples_final")
    facts = ("hyperparameters", "conventions", "versions", "git_commit", "config_sha256", "device", "gpu")
    keys(meta, "metadata", *names, *facts)
    need(meta["timestamp"].endswith("+00:00") and "T" in meta["timestamp"], "metadata.timestamp", meta["timestamp"])
    text(meta["name"], "metadata.name")
    for name in ("seed", "num_images", "num_samples", "num_samples_final"):
        integer(meta[name], f"metadata.{name}")
    listed(meta["image_ids"], "metadata.image_ids", integer, meta["num_images"])
    need(meta["image_ids"] == sorted(set(meta["image_ids"])), "metadata.image_ids", "not sorted and distinct")
    sampling = ("repulsion_scale", "repulsion_sigma_break", "repulsion_schedule", "repulsion_dino_model")
    keys(meta["hyperparameters"], "hyperparameters", *sampling, "pruning_step", "optimization_step", "seed", "sampler")
    conventions = ("measurement_range", "loss", "tau", "noise_sigma", "oversample", "compat")
    keys(meta["conventions"], "conventions", *conventions)
    for name in ("tau", "noise_sigma", "oversample"):
        number(meta["conventions"][name], f"conventions.{name}", null=True)
    keys(meta["versions"], "versions", "python", "torch")
    text(meta["git_commit"], "git_commit", null=True)
    seen = [i for row in meta["environments"] for i in row["image_ids"]]
    need(sorted(seen) == meta["image_ids"], "metadata.environments", "not every image once")
    need(len(meta["config_sha256"]) == 64, "config_sha256", meta["config_sha256"])
    keys(meta["device"], "device", "type", "name")
    keys(meta["gpu"], "gpu", "peak_vram_mb")
    number(meta["gpu"]["peak_vram_mb"], "gpu.peak_vram_mb", null=True)


def check_measurement(measurement, ids):
    """Returns how many particles each image has."""
    keys(measurement, "measurement", "per_image")
    rows = measurement["per_image"]
    listed(rows, "measurement.per_image", lambda r, w: keys(r, w, "loss", "noise_floor", "noise_floor_std", "excess"))
    need([r["image_id"] for r in rows] == ids, "measurement.per_image", "does not follow image_ids")
    for row in rows:
        listed(row["loss"], "loss", number)
        listed(row["excess"], "excess", number, len(row["loss"]))
        number(row["noise_floor"], "noise_floor")
        number(row["noise_floor_std"], "noise_floor_std")
    return [len(r["loss"]) for r in rows]


def check_quality(metric, name, ids, particles):
    keys(metric, name, "per_image", "overall")
    need([r["image_id"] for r in metric["per_image"]] == ids, name, "per_image does not follow image_ids")
    better = min if name.startswith("lpips") else max
    for row, count in zip(metric["per_image"], particles, strict=True):
        keys(row, name, "particle_ids", "samples", "mean", "std", "best", "best_particle", "selected")
        listed(row["samples"], f"{name}.samples", number, count)
        listed(row["particle_ids"], f"{name}.particle_ids", integer, count)
        number(row["std"], f"{name}.std", null=count < 2)
        for key in ("mean", "best", "selected"):
            number(row[key], f"{name}.{key}", null=count == 0)
        integer(row["best_particle"], f"{name}.best_particle", null=count == 0)
        if count:
            need(row["best"] == better(row["samples"]), name, "best is not the best sample")
            where = row["particle_ids"].index(row["best_particle"])
            need(row["samples"][where] == row["best"], name, "best_particle is not the best")
    overall = ("best_mean", "best_std", "mean_of_means", "std_of_means", "selected_mean")
    keys(metric["overall"], f"{name}.overall", *overall)
    for key in overall:
        spread = key in ("best_std", "std_of_means")
        number(metric["overall"][key], f"{name}.overall.{key}", null=spread or not any(particles))


def check_modes(modes, ids, particles):
    keys(modes, "modes", "per_image", "overall")
    need(len(modes["per_image"]) == len(ids), "modes.per_image", "does not follow image_ids")
    for row, count in zip(modes["per_image"], particles, strict=True):
        keys(row, "modes", "labels", "coverage", "twin_fit")
        listed(row["labels"], "labels", lambda v, w: need(v in LABELS, w, v), count)
        listed(row["twin_fit"], "twin_fit", lambda v, w: (number(v["a"], w), number(v["b"], w)), count)
        own_twin = "symmetric" in row["labels"]
        need((row["coverage"] is None) == own_twin, "coverage", "null beside two twins, or a number beside one")
        integer(row["coverage"], "coverage", null=own_twin)
    rates = ("success_rate", "particle_success_rate", "coverage_mean")
    keys(modes["overall"], "modes.overall", *rates)
    for key in rates:
        none_counts = key == "coverage_mean" and all(row["coverage"] is None for row in modes["per_image"])
        number(modes["overall"][key], f"modes.overall.{key}", null=none_counts or not any(particles))


def check_selection(selection, particles):
    rows, counts = selection["per_image"], [n for n in particles if n]
    need(len(rows) == len(counts), "selection.per_image", "one row an image with particles")
    for row, count in zip(rows, counts, strict=True):
        keys(row, "selection", "image_id", "selected_particle", "symmetry", "rule", "scores")
        integer(row["selected_particle"], "selected_particle")
        text(row["rule"], "rule")
        text(row["symmetry"], "symmetry")
        listed(row["scores"], "scores", number, count)


def check_hooks(metrics):
    repulsion = metrics["repulsion"]
    keys(repulsion, "repulsion", "enabled", "active_steps", "seconds", "per_step")
    need(isinstance(repulsion["enabled"], bool), "repulsion.enabled", repulsion["enabled"])
    integer(repulsion["active_steps"], "repulsion.active_steps")
    number(repulsion["seconds"], "repulsion.seconds")
    measured = ("sigma", "t", "scale", "mean_pairwise_distance", "repulsion_norm", "score_norm", "ratio")
    listed(repulsion["per_step"], "repulsion", lambda r, w: keys(r, w, "image_id", "step", *measured))
    symmetry = metrics.get("symmetry", {"moves": [], "seconds": 0.0, "per_image": []})  # older files lack it
    keys(symmetry, "symmetry", "moves", "seconds", "per_image")
    fields = ("image_id", "step", "sigma", "t", "move", "rule", "particle_id", "loss_before", "loss_after", "accepted")
    listed(symmetry["per_image"], "symmetry", lambda r, w: keys(r, w, *fields))
    fields = ("step", "sigma", "t", "losses", "distances", "kept", "pruned", "branched")
    listed(metrics["pruning"]["per_image"], "pruning", lambda r, w: keys(r, w, *fields))
    fields = ("iterations", "seconds", "initial_loss", "final_loss", "reason", "accepted")
    listed(metrics["optimization"]["per_image"], "optimization", lambda r, w: keys(r, w, *fields))


def check_timing(timing, images):
    keys(timing, "timing", "total_seconds", "per_image_seconds", "per_step_seconds", "phases")
    number(timing["total_seconds"], "total_seconds")
    listed(timing["per_image_seconds"], "per_image_seconds", number, images)
    listed(timing["per_step_seconds"], "per_step_seconds", number)
    need(set(timing["phases"]) in PHASES, "timing.phases", sorted(timing["phases"]))
    for name, phase in timing["phases"].items():
        keys(phase, name, "seconds", "steps")
        number(phase["seconds"], f"{name}.seconds")
        integer(phase["steps"], f"{name}.steps")


def check_vram(vram, phases, meta):
    if vram is None:
        need(meta["gpu"]["peak_vram_mb"] is None, "vram", "null beside a peak")
        return
    need(set(vram) <= {f"{name}_peak_mb" for name in phases}, "vram", sorted(vram))
    peaks = [v for v in vram.values() if v is not None]
    need(max(peaks) == meta["gpu"]["peak_vram_mb"], "gpu.peak_vram_mb", "is not the largest of vram")


def check_status(status, ids, particles, num_samples):
    rows = status["per_image"]
    left = dict(zip(ids, particles, strict=True))
    need([r["image_id"] for r in rows if r["state"] in ("ok", "diverged")] == ids, "status", "does not cover image_ids")
    for row in rows:
        keys(row, "status", "image_id", "state", "diverged_particles", "error")
        need(row["state"] in STATES, "status.state", row["state"])
        text(row["error"], "status.error", null=row["state"] not in ("failed", "skipped"))
        listed(row["diverged_particles"], "diverged_particles", integer)
        if row["state"] in ("failed", "skipped"):
            continue
        need((left[row["image_id"]] == 0) == (row["state"] == "diverged"), "status", "state against particles")
        need(left[row["image_id"]] + len(row["diverged_particles"]) <= num_samples, "status", "too many particles")
