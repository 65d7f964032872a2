"""The hooks through the command line, on the tiny prior."""

import metrics_schema
import numpy as np
import pytest
import timm
import torch
from planned_runs import EVERY, NEUTRAL, OPTIMISE, PRUNE, REPEL
from tiny import QUICK, command, reconstruct

FIVE = "sampler.annealing.num_steps=5"


def overrides(keys):
    return [f"{name}={value}".replace("True", "true") for name, value in keys.items()]


@pytest.fixture
def tiny_run(tiny_prior, image_folder, tmp_path, no_sheets):
    """Call it with keys: a run on one image with five levels; its folder, its outcome and its metrics."""

    def start(*more, name="tiny", run=reconstruct, **keys):
        given = ["model=embedded", f"model.path={tiny_prior}", "data=folder", f"data.dir={image_folder}", *QUICK, FIVE]
        given += ["data.end_id=1", "save_trajectory=false", f"save_dir={tmp_path}", f"name={name}"]
        starter = (lambda *a: command("posterior_sample", *a)) if run is command else run
        outcome = starter(*given, *overrides(keys), *more)
        assert outcome.status == 0, outcome.err
        return tmp_path / name, outcome, metrics_schema.load(tmp_path / name / "metrics.json")

    return start


def floats(folder):
    with np.load(folder / "floats" / "00000.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def plain_floats(tiny_prior, image_folder, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("plain")
    given = ["model=embedded", f"model.path={tiny_prior}", "data=folder", f"data.dir={image_folder}", *QUICK, FIVE]
    reconstruct(*given, "data.end_id=1", "save_trajectory=false", f"save_dir={save_dir}", "name=plain")
    return floats(save_dir / "plain")


@pytest.mark.parametrize("keys", NEUTRAL.values(), ids=NEUTRAL)
def test_hooks_that_are_off_leave_the_same_floats(tiny_run, plain_floats, keys):
    folder, _, metrics = tiny_run(**keys)
    ours = floats(folder)
    assert ours.keys() == plain_floats.keys()
    assert all(np.array_equal(ours[name], plain_floats[name]) for name in ours)
    assert metrics["repulsion"]["enabled"] is False and metrics["repulsion"]["active_steps"] == 0
    assert metrics["optimization"]["per_image"] == []


PHASES = {
    "sampling": (REPEL, {"sampling": 5}),
    "pruning": ({**REPEL, **PRUNE}, {"pre_pruning": 3, "post_pruning": 2}),
    "optimisation": ({**REPEL, **OPTIMISE}, {"pre_optimization": 5, "optimization": 0}),
    "all": (
        {**REPEL, **PRUNE, **OPTIMISE, **EVERY},
        {"pre_pruning": 3, "post_pruning_pre_optimization": 1, "optimization": 1},
    ),
    "all, pruning and optimisation at once": (
        {**REPEL, **PRUNE, **OPTIMISE, **EVERY, "optimization_step": 600},
        {"pre_pruning": 3, "post_pruning_pre_optimization": 0, "optimization": 2},
    ),
}


@pytest.mark.parametrize(("keys", "phases"), PHASES.values(), ids=PHASES)
def test_metrics_of_a_run_with_hooks(tiny_run, plain_floats, keys, phases):
    folder, _, metrics = tiny_run(**keys)
    ours = floats(folder)
    assert np.isfinite(ours["estimates"]).all()
    assert np.array_equal(ours["y"], plain_floats["y"])
    kept = ours["particle_ids"].tolist()
    assert not np.array_equal(ours["estimates"], plain_floats["estimates"][kept])
    assert {name: phase["steps"] for name, phase in metrics["timing"]["phases"].items()} == phases
    assert len(metrics["timing"]["per_step_seconds"]) == 5
    assert metrics["metadata"]["num_samples_final"] == len(kept) == (2 if "pruning_step" in keys else 4)

    stop = keys.get("optimization_step", -1)
    times = [t for t in (1000, 800, 600, 400, 200) if t > stop]
    assert metrics["repulsion"]["enabled"] and metrics["repulsion"]["features"] == "latent"
    assert [row["t"] for row in metrics["repulsion"]["per_step"]] == times
    assert metrics["repulsion"]["active_steps"] == len(times)
    assert {row["image_id"] for row in metrics["repulsion"]["per_step"]} == {0}

    rows = metrics["pruning"]["per_image"]
    assert len(rows) == ("pruning_step" in keys)
    for row in rows:
        assert (row["step"], row["t"], row["kept"]) == (2, 600, kept)
        assert kept == sorted(np.argsort(row["losses"])[:2].tolist())
    rows = metrics["optimization"]["per_image"]
    assert len(rows) == ("optimization_step" in keys)
    for row in rows:
        assert row["particle_ids"] == kept and len(row["iterations"]) == len(kept)
        levels = sum(t <= stop for t in (600, 400, 200)) if keys.get("optimization_when") == "every" else 1
        assert len(row["per_step"]) == levels and sum(row["iterations"]) <= 20 * levels * len(kept)
        assert sum(row["iterations"]) > 0
        assert set(row["reason"]) <= {"floor", "plateau", "max_iters"}


OURS = {  # the keys of experiment=ours_fast and a turned child, in a small way
    "restart_rounds": 2,
    "restart_sigmas": "[5.0,0.5]",
    "restart_children": 3,
    "restart_steps": 3,
    "restart_conjugate": 1,
    "restart_polish": 2,
    "restart_rule": "posterior",
    "optimization_step": 200,
    "optimization_best": 1,
    "optimization_twins": True,
    "optimization_prior_sigma": 0.1,
    "optimization_max_iters": 3,
    "selection_rule": "posterior",
}


def test_rounds_and_twins_from_end_to_end(tiny_run):
    folder, _, metrics = tiny_run(**OURS)
    (image,) = metrics["restarts"]["per_image"]
    first, second = image["rounds"]
    assert (first["particle_ids"], first["round"], second["round"]) == ([0, 1, 2, 3], 1, 2)
    (best,) = first["kept"]
    assert first["branched"] == [{"parent": best, "child": child} for child in (8, 9, 10)]
    assert first["conjugated"] == []
    assert second["conjugated"] == ([13] if second["kept"] == [best] else [])
    assert second["particle_ids"] == [best, 8, 9, 10]
    assert first["sigma"] <= 5.0 and second["sigma"] <= 0.5 and first["step"] < second["step"]
    assert first["energies"] != pytest.approx(first["losses"])
    (optimised,) = metrics["optimization"]["per_image"]
    parent, twin = optimised["particle_ids"]
    assert optimised["twins"] == [{"parent": parent, "child": twin}] and twin == 14
    assert parent in [*second["kept"], *(pair["child"] for pair in second["branched"])]
    (selection,) = metrics["selection"]["per_image"]
    assert selection["rule"].startswith("posterior") and selection["selected_particle"] in (parent, twin)
    assert metrics["modes"]["per_image"][0]["coverage"] <= 1
    assert len(metrics["psnr_channel_aligned"]["per_image"][0]["samples"]) == 2

    before = floats(folder)
    tiny_run(**OURS, name="again")
    again = floats(folder.parent / "again")
    assert all(np.array_equal(again[name], before[name]) for name in before)


def test_lineages_from_end_to_end(tiny_run):
    keys = {**OURS, "restart_lineages": 2, "restart_children": 1}
    folder, outcome, metrics = tiny_run(**keys, restart_agreement=80)
    assert "no two agreed in: " in outcome.out
    assert (folder / "sheets" / "00000.png").read_text().endswith(": no two lineages agreed")
    (image,) = metrics["restarts"]["per_image"]
    assert [len(row["kept"]) for row in image["rounds"]] == [2, 2]
    end = image["end"]
    assert end["rounds"] == 2 and len(end["particle_ids"]) == 4
    assert all(0 < row["agreement_db"] < 80 for row in [*image["rounds"], end])
    (winner,) = end["kept"]
    assert end["energies"][end["particle_ids"].index(winner)] == min(end["energies"])
    assert metrics["optimization"]["per_image"][0]["particle_ids"][0] == winner

    folder, _, metrics = tiny_run(**keys, restart_agreement=0.1, name="easy")
    assert (folder / "sheets" / "00000.png").read_text().endswith(": two lineages agreed")
    (image,) = metrics["restarts"]["per_image"]
    assert image["rounds"] == [] and image["end"]["rounds"] == 0


def test_resuming_a_run_with_all_hooks_changes_nothing(tiny_run):
    keys = {**REPEL, **PRUNE, **OPTIMISE, **EVERY, "pruning_branch": 3.0}
    folder, _, before = tiny_run(**keys)
    first = floats(folder)
    _, again, after = tiny_run(**keys)
    assert "skipped" in again.out
    before["metadata"].pop("timestamp"), after["metadata"].pop("timestamp")
    assert before == after
    assert all(np.array_equal(first[name], value) for name, value in floats(folder).items())


def test_the_same_command_gives_the_same_floats(tiny_run):
    keys = {**REPEL, **PRUNE, **OPTIMISE, "pruning_branch": 3.0}
    first, second = (floats(tiny_run(name=name, **keys)[0]) for name in ("first", "second"))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_branching_fills_the_freed_places(tiny_run):
    """With trajectory figures, through Hydra's own command line."""
    keys = {**PRUNE, "pruning_branch": 5.0, "pruning_keep": 1}
    folder, _, metrics = tiny_run("save_trajectory=true", run=command, **keys)
    (row,) = metrics["pruning"]["per_image"]
    assert row["branched"] == [{"parent": row["kept"][0], "child": child} for child in (4, 5, 6)]
    assert sorted(metrics["psnr"]["per_image"][0]["particle_ids"]) == [*row["kept"], 4, 5, 6]
    assert metrics["metadata"]["num_samples_final"] == 4
    assert (folder / "trajectory" / "00000.png").exists()
    assert (folder / "samples" / "00000_particle6.png").exists()


def test_masked_particles_are_left_out_of_the_results(tiny_run, plain_floats):
    """The survivors are those of the plain run, bit for bit, because the batch is."""
    folder, _, metrics = tiny_run(**PRUNE, pruning_mode="mask", pruning_keep=3)
    ours, (row,) = floats(folder), metrics["pruning"]["per_image"]
    assert ours["particle_ids"].tolist() == row["kept"] and len(row["kept"]) == 3
    assert np.array_equal(ours["estimates"], plain_floats["estimates"][row["kept"]])
    assert metrics["status"]["per_image"][0]["diverged_particles"] == []


@pytest.mark.parametrize(
    ("features", "kernel"),
    [("latent", "plain"), ("latent", "quotient"), ("pixel", "plain"), ("pixel", "quotient"), ("pixel", "odd")],
)
def test_every_space_and_kernel_runs(tiny_run, plain_floats, features, kernel):
    folder, _, metrics = tiny_run(**REPEL | {"repulsion_features": features}, repulsion_kernel=kernel)
    assert metrics["repulsion"]["kernel"] == kernel and metrics["repulsion"]["features"] == features
    estimates = floats(folder)["estimates"]
    assert np.isfinite(estimates).all() and not np.array_equal(estimates, plain_floats["estimates"])
    for row in metrics["repulsion"]["per_step"]:
        assert row["ratio"] == pytest.approx(row["scale"], rel=1e-3)


def test_dino_from_a_file_runs(tiny_run, plain_floats, tmp_path):
    model = "vit_tiny_patch16_224"
    torch.save(timm.create_model(model, pretrained=False, num_classes=0).state_dict(), tmp_path / "tiny.pth")
    keys = {**REPEL, "repulsion_features": "dino", "repulsion_dino_model": model, "repulsion_sigma_break": 5.0}
    folder, _, metrics = tiny_run(**keys, repulsion_dino_path=tmp_path / "tiny.pth")
    assert metrics["repulsion"]["features"] == "dino" and metrics["repulsion"]["active_steps"] >= 1
    assert all(row["repulsion_norm"] > 0 for row in metrics["repulsion"]["per_step"])
    assert not np.array_equal(floats(folder)["estimates"], plain_floats["estimates"])


def test_dino_without_its_file_ends_in_one_sentence_before_any_result(tiny_prior, tmp_path):
    keys = [*overrides(REPEL), f"repulsion_dino_path={tmp_path}/none.pth", "repulsion_features=dino"]
    outcome = reconstruct("model=embedded", f"model.path={tiny_prior}", *QUICK, *keys, f"save_dir={tmp_path}/results")
    assert outcome.status != 0
    assert outcome.err.strip().splitlines()[-1].endswith(f"repulsion_dino_path={tmp_path}/none.pth: no such file")
    assert "Traceback" not in outcome.err and not (tmp_path / "results").exists()
