import copy
import json
import math

import metrics_schema
import pytest
import torch
from omegaconf import OmegaConf

import posterior_sample  # noqa: F401 (registers the schema)
from particledaps.checks import SettingsError
from particledaps.reports.run_table import results_table
from particledaps.reports.write_metrics import build_metrics, std
from particledaps.runs.folder import RunFolder, finite, write_atomically
from particledaps.settings.command_line import compose_config

CONFIG = OmegaConf.to_container(compose_config("config", ["num_samples=3"]), resolve=True)
PSNR, SSIM, LPIPS = [20.0, 30.0, 10.0], [0.5, 0.9, 0.1], [0.4, 0.6, 0.2]


def record(image_id=0, particles=(0, 1, 2), lpips=False, phases=("sampling",), peaks=None):
    """A finished image in which particle ``p`` has the values ``PSNR[p]`` and so on."""
    rows = list(particles)
    values = {"psnr": PSNR, "ssim": SSIM} | ({"lpips": LPIPS} if lpips else {})
    metrics = {n + s: [v[p] for p in rows] for n, v in values.items() for s in ("", "_aligned")}
    modes = {"labels": ["0"] * len(rows), "coverage": 1, "twin_fit": [{"a": 1.0, "b": 0.0}] * len(rows)}
    chosen = {"selected_particle": min(rows, default=None), "symmetry": "identity", "rule": "r"}
    return {
        "image_id": image_id,
        "state": "ok" if rows else "diverged",
        "diverged_particles": [p for p in range(3) if p not in rows],
        "error": None,
        "particle_ids": rows,
        "metrics": metrics,
        "selected": {n: v[0] for n, v in metrics.items()} if rows else None,
        "modes": modes | {"solved": [PSNR[p] > 18 for p in rows]},
        "measurement": {
            "loss": [1.0] * len(rows),
            "noise_floor": 1.0,
            "noise_floor_std": 0.1,
            "excess": [0.0] * len(rows),
        },
        "repulsion": {
            "enabled": False,
            "features": None,
            "kernel": "plain",
            "active_steps": 0,
            "seconds": 0.0,
            "per_step": [],
        },
        "pruning": None,
        "optimization": None,
        "selection": chosen | {"scores": [1.0] * len(rows)} if rows else None,
        "tau": 0.05,
        "timing": {
            "seconds": 2.0,
            "per_step_seconds": [0.5, 1.0 + image_id],
            "phases": {name: {"seconds": 1.0, "steps": 2} for name in phases},
        },
        "vram": {name: (peaks or {}).get(name) for name in phases},
        "device": {"type": "cpu", "name": None},
    }


def failed(image_id):
    error = "RuntimeError: out of memory"
    return {"image_id": image_id, "state": "failed", "diverged_particles": [], "error": error}


def built(*records):
    """``build_metrics`` as it arrives in the file, checked."""
    metrics = json.loads(json.dumps(finite(build_metrics(list(records), CONFIG)), allow_nan=False))
    metrics_schema.check(metrics)
    return metrics


@pytest.mark.parametrize("phases", metrics_schema.PHASES, ids=len)
def test_every_set_of_phases(phases):
    peaks = {name: 10.0 * (i + 1) for i, name in enumerate(sorted(phases))}
    metrics = built(record(0, phases=phases, peaks=peaks), record(1, phases=phases, peaks=dict.fromkeys(peaks, 5.0)))
    assert metrics["timing"]["phases"] == {name: {"seconds": 2.0, "steps": 4} for name in phases}
    assert metrics["vram"] == {f"{name}_peak_mb": peak for name, peak in peaks.items()}
    assert metrics["metadata"]["gpu"]["peak_vram_mb"] == max(peaks.values())


def test_statistics_of_particles_and_images():
    psnr = built(record(0), record(1, particles=(0, 2)))["psnr"]
    first, second = psnr["per_image"]
    assert (first["mean"], first["std"], first["best"], first["best_particle"]) == (20, 10, 30, 1)
    assert (second["mean"], second["best"], second["best_particle"], second["selected"]) == (15, 20, 0, 20)
    assert second["particle_ids"] == [0, 2]
    assert second["std"] == pytest.approx(math.sqrt(50))
    overall = psnr["overall"]
    assert (overall["best_mean"], overall["mean_of_means"], overall["selected_mean"]) == (25, 17.5, 20)
    assert overall["best_std"] == pytest.approx(math.sqrt(50))
    assert std([1.0]) is None and std([1.0, 3.0]) == pytest.approx(math.sqrt(2))


def test_lpips_is_better_when_lower_and_null_unless_all_images_have_it():
    lpips = built(record(0, lpips=True))["lpips"]["per_image"][0]
    assert (lpips["best"], lpips["best_particle"]) == (0.2, 2)
    metrics = built(record(0, lpips=True), record(1))
    assert metrics["lpips"] is None and metrics["psnr"] is not None


def test_times_add_up():
    timing = built(record(0), record(1))["timing"]
    assert timing["total_seconds"] == 4.0
    assert timing["per_image_seconds"] == [2.0, 2.0]
    assert timing["per_step_seconds"] == [0.5, 1.5]


def test_success_is_a_mean_over_images_of_any_number_of_particles():
    modes = built(record(0), record(1, particles=(2,)))["modes"]["overall"]
    assert (modes["success_rate"], modes["particle_success_rate"]) == (0.5, pytest.approx((2 / 3 + 0) / 2))


def test_a_diverged_image_counts_in_no_mean():
    metrics = built(record(0), record(1, particles=()))
    assert metrics["psnr"]["overall"] == built(record(0))["psnr"]["overall"]
    assert metrics["psnr"]["per_image"][1]["best"] is None
    assert metrics["status"]["per_image"][1] == {
        "image_id": 1,
        "state": "diverged",
        "diverged_particles": [0, 1, 2],
        "error": None,
    }
    assert [r["image_id"] for r in metrics["selection"]["per_image"]] == [0]
    assert "1 " in results_table(metrics, {})


def test_the_table_says_in_which_images_no_two_lineages_agreed():
    def ended(image_id, agreed):
        return record(image_id) | {"restarts": [], "restarts_end": {"agreed": agreed}}

    table = results_table(built(ended(0, True), ended(1, False), ended(2, False)), {1: "tom"})
    assert table.endswith("two lineages agreed in 1 of 3 images\nno two agreed in: tom, 2")
    assert results_table(built(ended(0, True)), {}).endswith("\ntwo lineages agreed in 1 of 1 images")
    assert "agree" not in results_table(built(record(0), ended(1, None)), {})


def test_a_huge_loss_keeps_its_column():
    metrics = built(record(0))
    metrics["measurement"]["per_image"][0]["loss"] = [5533628.0]
    header, row = results_table(metrics, {}).splitlines()[1:3]
    assert row.split()[-4] == "5.534e+06" and row.index("5.534e+06") + 9 == header.index("loss") + 4


def test_failed_images_are_in_the_status_only():
    metrics = built(failed(0), record(1), failed(2))
    assert metrics["metadata"]["image_ids"] == [1]
    assert [r["state"] for r in metrics["status"]["per_image"]] == ["failed", "ok", "failed"]
    assert metrics["psnr"] == built(record(1))["psnr"]
    nothing = built(failed(0))
    assert nothing["psnr"] is None and nothing["modes"] is None
    assert built()["status"]["per_image"] == []


def test_without_truth_quality_and_modes_are_null():
    measured = record(0) | {"metrics": None, "selected": None, "modes": None}
    metrics = built(measured)
    assert all(metrics[key] is None for key in (*metrics_schema.METRICS, "modes"))
    assert metrics["measurement"]["per_image"][0]["loss"] == [1.0] * 3
    assert "-" in results_table(metrics, {0: "y"})


def test_conventions_of_a_custom_operator_are_not_made_up():
    config = copy.deepcopy(CONFIG)
    assert build_metrics([], config)["metadata"]["conventions"]["noise_sigma"] == 0.05
    config["task"]["kind"] = "custom"
    conventions = build_metrics([], config)["metadata"]["conventions"]
    assert conventions["noise_sigma"] is None and conventions["oversample"] is None


def test_numbers_that_json_lacks_become_null():
    value = {"a": [1.0, math.nan, (math.inf, 2)], "b": "nan", "c": {"d": -math.inf}, "e": True}
    assert finite(value) == {"a": [1.0, None, [None, 2]], "b": "nan", "c": {"d": None}, "e": True}


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a.json", "x" * 100_000 + "\ud800")
    assert (tmp_path / "a.json").read_text() == "old"


def test_folder_finds_what_is_finished(tmp_path):
    folder = RunFolder(str(tmp_path), "run", CONFIG)
    assert list(tmp_path.iterdir()) == []
    folder.open()
    for row in (record(7), failed(3), record(11)):
        folder.save(row)
        metrics_schema.load(folder.path / "metrics.json")
    assert [(folder.summary(i) or {}).get("state") for i in (7, 3, 11, 5)] == ["ok", "failed", "ok", None]
    assert [r["image_id"] for r in folder.records()] == [3, 7, 11]
    folder.save(record(3))
    assert folder.summary(3)["state"] == "ok"
    assert not list(folder.path.rglob("*.tmp"))


def test_folder_is_shared_by_runs_that_give_the_same_numbers_only(tmp_path):
    RunFolder(str(tmp_path), "run", CONFIG).open()
    same = copy.deepcopy(CONFIG) | {"device": "cuda", "save_trajectory": False}
    same["data"] |= {"start_id": 3, "end_id": 4}
    RunFolder(str(tmp_path), "run", same)
    other = copy.deepcopy(same) | {"seed": 1, "extra": 1}
    other["task"]["oversample"] = 3.0
    with pytest.raises(SettingsError, match=r"differs in extra, seed, task\.oversample\)"):
        RunFolder(str(tmp_path), "run", other)


SPOILERS = {
    "missing key": lambda m: m.pop("pruning"),
    "schema": lambda m: m.update(schema=2),
    "string for number": lambda m: m["psnr"]["overall"].update(best_mean="20"),
    "nan": lambda m: m["psnr"]["per_image"][0].update(mean=math.nan),
    "bool for number": lambda m: m["timing"].update(total_seconds=True),
    "short list": lambda m: m["psnr"]["per_image"][0]["samples"].pop(),
    "wrong best": lambda m: m["psnr"]["per_image"][0].update(best=20.0),
    "wrong best particle": lambda m: m["psnr"]["per_image"][0].update(best_particle=0),
    "wrong order": lambda m: m["measurement"]["per_image"].reverse(),
    "phases": lambda m: m["timing"]["phases"].update(pruning={"seconds": 0, "steps": 0}),
    "one null metric": lambda m: m.update(ssim=None),
    "label": lambda m: m["modes"]["per_image"][0]["labels"].__setitem__(0, "90"),
    "state": lambda m: m["status"]["per_image"][0].update(state="done"),
    "diverged with samples": lambda m: m["status"]["per_image"][0].update(state="diverged"),
    "hash": lambda m: m["metadata"].update(config_sha256=""),
    "vram": lambda m: m.update(vram={"sampling_peak_mb": 3.0}),
}


@pytest.mark.parametrize("spoil", SPOILERS.values(), ids=SPOILERS)
def test_the_check_itself_can_fail(spoil):
    metrics = copy.deepcopy(built(record(0), record(1)))
    spoil(metrics)
    with pytest.raises(AssertionError):
        metrics_schema.check(metrics)


def test_standard_deviation_agrees_with_torch():
    values = [1.0, 2.5, 7.0]
    assert std(values) == pytest.approx(torch.tensor(values).std().item())
