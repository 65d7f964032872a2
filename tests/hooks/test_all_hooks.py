import dataclasses

import metrics_schema
import numpy as np
import pytest
import timm
import torch
from sampler_support import (
    LEVELS,
    SIGMA_MAX,
    SIGMA_MIN,
    Recorder,
    assert_same,
    loop,
    measurement,
    problem,
    run,
    settings,
)
from tiny import QUICK, command, reconstruct

from diffusion.paths import edm_path
from operators.phase_retrieval import PhaseRetrieval
from pruning import Pruning
from repulsion import ImageSpace, LatentSpace, Repulsion
from resample_opt import LatentOptimization
from runs.checks import SettingsError
from runs.hooks import build_feature_space, build_hook_plan, optimization_record, repulsion_record
from runs.phases import ClockHook, PhaseClock
from runs.rng import ParticleStreams
from runs.settings import RunSettings
from sampler import Info

CPU, IDS = torch.device("cpu"), [0, 1, 2, 3]
PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)
REPEL = {"repulsion_scale": 0.4, "repulsion_features": "latent", "repulsion_sigma_break": 0.01}
PRUNE, OPTIMISE = {"pruning_step": 600}, {"optimization_step": 400, "optimization_max_iters": 20}
EVERY = {"optimization_when": "every"}


def planned(**keys):
    """The plan of these keys on the analytic problem, t = 1000, 800, 600, 400, 200."""
    return build_hook_plan(RunSettings(**keys), *problem(), PATH, CPU)


def planned_run(**keys):
    """The last state, the record's parts and the clock of a run on the analytic problem."""
    plan, clock, info, recorder = planned(**keys), PhaseClock(CPU), Info(), Recorder()
    hooks = [*plan.hooks(measurement(), clock), recorder, ClockHook(clock)]
    clock.enter(plan.phases[0])
    state = loop(settings(), hooks).sample(measurement(), ParticleStreams(42, 0), IDS, info)
    clock.leave()
    assert set(clock.phases) == set(plan.phases)
    return state, info, clock, recorder, plan


NEUTRAL = {
    "nothing": {},
    "repulsion of scale 0": {**REPEL, "repulsion_scale": 0.0},
    "repulsion that only logs": {**REPEL, "repulsion_scale": 0.0, "repulsion_log": True},
    "no pruning": {"pruning_step": -1, "pruning_keep": 1},
    "pruning that keeps all": {**PRUNE, "pruning_keep": 4},
    "no optimisation": {"optimization_step": -1, "optimization_accept": "loss"},
    "no iterations": {**OPTIMISE, "optimization_max_iters": 0},
    "no iterations at every level": {**OPTIMISE, **EVERY, "optimization_max_iters": 0},
    "all of them": {
        **REPEL,
        "repulsion_scale": 0.0,
        "repulsion_log": True,
        **PRUNE,
        "pruning_keep": 4,
        **OPTIMISE,
        "optimization_max_iters": 0,
    },
}
ACTIVE = {
    "repulsion": REPEL,
    "pruning": {**PRUNE, "pruning_keep": 2},
    "optimisation": {**OPTIMISE, "optimization_accept": "loss"},
}


@pytest.mark.parametrize("keys", NEUTRAL.values(), ids=NEUTRAL)
def test_hooks_that_are_off_are_the_plain_run(keys):
    assert_same(planned_run(**keys)[0], run(settings()))


@pytest.mark.parametrize("keys", ACTIVE.values(), ids=ACTIVE)
def test_hooks_that_are_on_are_not(keys):
    state, plain = planned_run(**keys)[0], run(settings())
    assert state.z0_y.shape != plain.z0_y.shape or not torch.equal(state.z0_y, plain.z0_y)


# --- The plan --------------------------------------------------------------------------------------------------------


def test_hooks_get_what_the_keys_say():
    plan = planned(
        **REPEL,
        repulsion_unit="raw",
        repulsion_schedule="cosine",
        repulsion_on="z_t",
        repulsion_log=True,
        pruning_step=799,
        pruning_keep=3,
        pruning_rule="diverse",
        pruning_tolerance=1.5,
        pruning_close=0.2,
        pruning_branch=2.0,
        optimization_step=401,
        optimization_when="every",
        optimization_lr=0.3,
        optimization_max_iters=7,
        optimization_window=5,
        optimization_weight_decay=0.2,
        optimization_prior_sigma=0.15,
        optimization_accept="floor",
        num_samples=9,
        decode_batch=2,
    )
    hooks = plan.hooks(measurement(), PhaseClock(CPU))
    repulsion, pruning, optimisation = (
        next(h for h in hooks if isinstance(h, kind)) for kind in (Repulsion, Pruning, LatentOptimization)
    )
    assert [h for h in hooks if h in (repulsion, pruning, optimisation)] == [repulsion, pruning, optimisation]
    assert dataclasses.asdict(repulsion.settings) == {
        "scale": 0.4,
        "unit": "raw",
        "sigma_break": 0.01,
        "schedule": "cosine",
        "estimate": "z_t",
        "stop_at": 401,
        "log": True,
    }
    assert dataclasses.asdict(pruning.settings) == {
        "at_level": 2,
        "keep": 3,
        "rule": "diverse",
        "mode": "slice",
        "tolerance": 1.5,
        "close": 0.2,
        "branch_sigma": 2.0,
        "first_child_id": 9,
    }
    assert dataclasses.asdict(optimisation.settings) == {
        "from_level": 3,
        "when": "every",
        "lr": 0.3,
        "max_iters": 7,
        "window": 5,
        "weight_decay": 0.2,
        "prior_sigma": 0.15,
        "tau": problem()[1].noise_sigma,
        "accept": "floor",
        "best": None,
        "twins": False,
    }


def test_tau_of_the_optimisation_can_be_given():
    hooks = planned(**OPTIMISE, optimization_tau=0.7).hooks(measurement(), PhaseClock(CPU))
    assert next(h for h in hooks if isinstance(h, LatentOptimization)).settings.tau == 0.7


def test_expected_loss_is_the_noise_floor_and_the_misfit_of_the_prior():
    prior, operator = problem()
    prior = dataclasses.replace(prior, misfit_excess={"matrix": (3.0, 0.4), "other": (99.0, 99.0)})
    plan = build_hook_plan(RunSettings(**PRUNE, **OPTIMISE), prior, operator, PATH, CPU)
    hooks = plan.hooks(measurement(), PhaseClock(CPU))
    floor = operator.noise_floor(measurement())
    pruning, optimisation = (next(h for h in hooks if isinstance(h, k)) for k in (Pruning, LatentOptimization))
    assert optimisation.expected == pytest.approx(floor.mean.item() + 3.0)
    assert pruning.loss_std == pytest.approx((floor.std.item() ** 2 + 0.4**2) ** 0.5)


@pytest.mark.parametrize(
    ("keys", "phases"),
    [
        ({}, {"sampling": 5}),
        (REPEL, {"sampling": 5}),
        (PRUNE, {"pre_pruning": 3, "post_pruning": 2}),
        ({"pruning_step": 1000}, {"pre_pruning": 1, "post_pruning": 4}),
        ({"pruning_step": 200}, {"pre_pruning": 5, "post_pruning": 0}),
        (OPTIMISE, {"pre_optimization": 5, "optimization": 0}),
        ({**OPTIMISE, **EVERY}, {"pre_optimization": 4, "optimization": 1}),
        ({**OPTIMISE, **EVERY, "optimization_step": 0}, {"pre_optimization": 5, "optimization": 0}),
        ({**PRUNE, **OPTIMISE}, {"pre_pruning": 3, "post_pruning_pre_optimization": 2, "optimization": 0}),
        ({**PRUNE, **OPTIMISE, **EVERY}, {"pre_pruning": 3, "post_pruning_pre_optimization": 1, "optimization": 1}),
        (
            {**PRUNE, **OPTIMISE, **EVERY, "optimization_step": 600},
            {"pre_pruning": 3, "post_pruning_pre_optimization": 0, "optimization": 2},
        ),
        (
            {**PRUNE, **OPTIMISE, "optimization_step": 600},
            {"pre_pruning": 3, "post_pruning_pre_optimization": 2, "optimization": 0},
        ),
    ],
)
def test_phases_count_the_levels_between_the_boundaries(keys, phases):
    clock = planned_run(**keys)[2]
    assert {name: phase.steps for name, phase in clock.phases.items()} == phases
    assert sum(phase.seconds for phase in clock.phases.values()) > 0.9 * sum(clock.step_seconds)  # and the end


def test_levels_of_children_belong_to_the_phase_in_which_they_run():
    """They run levels 1 and 2 again after pruning, then level 3 with the survivors, then 4."""
    branch = {**PRUNE, "pruning_branch": PATH[1].item()}
    clock = planned_run(**branch)[2]
    assert {n: p.steps for n, p in clock.phases.items()} == {"pre_pruning": 3, "post_pruning": 4}
    clock = planned_run(**branch, **OPTIMISE, **EVERY)[2]
    steps = {n: p.steps for n, p in clock.phases.items()}
    assert steps == {"pre_pruning": 3, "post_pruning_pre_optimization": 3, "optimization": 1}
    assert len(clock.step_seconds) == 7


@pytest.mark.parametrize("step", [0, 150, 200, 400, 999])
def test_optimisation_at_every_level_reaches_the_answer_however_late(step):
    state, info, *_ = planned_run(**EVERY, **{**OPTIMISE, "optimization_step": step}, optimization_accept="loss")
    rows = info.rows["optimization"]
    assert len(rows) == max(sum(t <= step for t in (1000, 800, 600, 400, 200)), 1)
    operator = problem()[1]
    assert rows[-1]["final_loss"] == pytest.approx(operator.loss(state.z0_y, state.y).tolist())


@pytest.mark.parametrize(("step", "active"), [(-1, 5), (0, 5), (200, 4), (400, 3), (599, 3), (600, 2)])
@pytest.mark.parametrize("when", ["end", "every"])
def test_repulsion_is_off_once_optimisation_may_begin(step, active, when):
    keys = {**REPEL, "optimization_step": step, "optimization_when": when, "optimization_max_iters": 3}
    _, info, _, recorder, plan = planned_run(**keys)
    record = repulsion_record(plan, info)
    assert record["active_steps"] == active and record["enabled"]
    assert [row["t"] for row in record["per_step"]] == pytest.approx([1000, 800, 600, 400, 200][:active])
    assert [s.drift is not None for s in recorder.seen["before_ode"]] == [k < active for k in range(LEVELS)]


def test_children_repel_each_other_at_their_own_levels():
    keys = {**REPEL, **PRUNE, "pruning_keep": 1, "pruning_branch": PATH[1].item()}
    _, info, _, recorder, _ = planned_run(**keys)
    assert [row["step"] for row in info.rows["repulsion"]] == [0, 1, 2, 1, 2, 3, 4]
    drifts = [s.drift for s in recorder.seen["before_ode"]]
    assert [len(term) for term, _ in drifts] == [4, 4, 4, 3, 3, 4, 4]
    assert all((term.flatten(1).norm(dim=1) > 0).all() for term, _ in drifts)


def test_record_of_an_optimisation_sums_over_levels():
    state, info, *_ = planned_run(**{**OPTIMISE, **EVERY, "optimization_step": 600}, optimization_accept="loss")
    record, rows = optimization_record(info, [2, 0]), info.rows["optimization"]
    assert record["iterations"] == [sum(row["iterations"][i] for row in rows) for i in (2, 0)]
    assert record["initial_loss"] == [rows[0]["initial_loss"][i] for i in (2, 0)]
    assert record["final_loss"] == [rows[-1]["final_loss"][i] for i in (2, 0)]
    assert record["reason"] == [rows[-1]["reason"][i] for i in (2, 0)]
    assert len(record["per_step"]) == 3
    assert optimization_record(Info(), [0]) is None


def test_three_hooks_at_once_leave_each_particle_to_itself_after_the_break():
    """Repulsion binds particles together; afterwards each one goes on as if it were alone."""
    keys = {**REPEL, **PRUNE, **OPTIMISE, **EVERY, "repulsion_sigma_break": PATH[2].item()}
    together, *_ = planned_run(**keys, pruning_keep=4)
    pruned, _, _, recorder, _ = planned_run(**keys, pruning_keep=2)
    rows = [together.ids.index(i) for i in pruned.ids]
    assert len(pruned) == 2
    assert_same(pruned, together, rows, exact=False)


# --- The feature space -----------------------------------------------------------------------------------------------


def space_of(**keys):
    return build_feature_space(RunSettings(**keys), problem()[0], PhaseRetrieval(), CPU)


def test_feature_space_is_the_one_that_is_asked_for(monkeypatch):
    monkeypatch.setattr("runs.hooks.dino_weights", lambda model, path: None)
    for keys, kind, symmetries in (
        ({"repulsion_features": "latent"}, LatentSpace, 1),
        ({"repulsion_features": "auto"}, LatentSpace, 1),
        ({"repulsion_features": "latent", "repulsion_kernel": "quotient"}, LatentSpace, 2),
        ({"repulsion_features": "pixel"}, ImageSpace, 1),
        ({"repulsion_features": "pixel", "repulsion_kernel": "quotient"}, ImageSpace, 2),
        ({"repulsion_features": "pixel", "repulsion_kernel": "odd"}, ImageSpace, 1),
        ({"repulsion_features": "auto", "repulsion_kernel": "odd"}, ImageSpace, 1),
    ):
        space = space_of(**keys)
        assert type(space) is kind and len(space.symmetries) == symmetries
        if kind is ImageSpace:
            assert (space.odd_under is not None) is (keys.get("repulsion_kernel") == "odd")
            assert space.name == "pixel"
    with pytest.raises(SettingsError, match="repulsion_features=dino: no weights of vit_small_patch16_224.dino"):
        space_of(repulsion_features="dino")


def test_odd_kernel_needs_a_symmetry():
    with pytest.raises(SettingsError, match="repulsion_kernel=odd: the operator matrix has no symmetry"):
        planned(repulsion_scale=1.0, repulsion_features="pixel", repulsion_kernel="odd")


def test_no_feature_space_where_repulsion_is_off():
    assert planned(repulsion_features="dino").space is None


# --- The command line on the tiny prior ------------------------------------------------------------------------------

FIVE = "sampler.annealing.num_steps=5"


def overrides(keys):
    return [f"{name}={value}".replace("True", "true") for name, value in keys.items()]


@pytest.fixture
def tiny_run(tiny_prior, image_folder, tmp_path, monkeypatch):
    """Call it with keys: a run on one image with five levels; its folder, its outcome and its metrics."""
    monkeypatch.setattr("runs.reconstruct.contact_sheet", lambda path, rows, heading: path.write_text(heading))

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
