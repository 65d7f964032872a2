import dataclasses
import json

import metrics_schema
import pytest
import torch
from analytic import normal
from planned_runs import planned
from sampler_support import (
    LEVELS,
    SIGMA_MAX,
    SIGMA_MIN,
    Recorder,
    assert_same,
    full_state,
    loop,
    measurement,
    problem,
    run,
    settings,
)
from tiny import QUICK, command

import pruning
from particledaps.checks import Checks, SettingsError
from particledaps.paths.schedules import edm_path
from particledaps.runs.clock import PhaseClock
from particledaps.streams import SHARED, ParticleStreams
from resampling import (
    Resampling,
    Settings,
    choose_beta,
    effective_sample_size,
    keep_two_lineages,
    systematic_counts,
    tempered_weights,
)
from run_settings import HookKeys, check_hooks
from sampler import Info

PATH = edm_path(LEVELS, SIGMA_MAX, SIGMA_MIN)
CPU, IDS = torch.device("cpu"), [0, 1, 2, 3, 4, 5]


def resampling(**changes):
    where = {"noise_sigma": 0.1, "last_level": LEVELS - 1, "from_level": 0}
    when = {"sigma": 1.5, "sigma_min": 0.0}
    for name, value in changes.items():
        (when if name in when else where)[name] = value
    return Resampling(Settings(**when), **where)


def resampled_run(*hooks, ids=IDS):
    info, recorder = Info(), Recorder()
    state = loop(settings(), [*hooks, recorder]).sample(measurement(), ParticleStreams(42, 0), ids, info)
    return state, info.rows.get("resampling", []), recorder.seen


# --- Weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 4, 8, 50])
@pytest.mark.parametrize("scale", [3.0, 50.0, 1e4, 1e9])
def test_weights_are_tempered_to_half_of_the_particles(count, scale):
    energies = (scale * normal(count, seed=count).abs()).tolist()
    beta = choose_beta(energies, count / 2)
    size = effective_sample_size(tempered_weights(energies, beta))
    assert 0 < beta <= 1
    assert size == pytest.approx(count / 2, abs=1e-3) or (beta == 1 and size > count / 2)
    if scale > 50:
        assert beta < 1


def test_weights_that_scatter_little_are_not_sharpened():
    assert choose_beta([0.0, 0.01, 0.02], 1.5) == 1.0
    assert choose_beta([7.0] * 4, 2.0) == 1.0
    assert choose_beta([0.0, 0.0, 0.0, 1e6], 2.0) == 1.0  # three share the lowest: no beta gets below 3


def test_weights_are_those_of_the_formula():
    weights = tempered_weights([5.0, 6.0, 8.0], 0.5)
    expected = torch.softmax(-0.5 * torch.tensor([5.0, 6.0, 8.0], dtype=torch.float64), 0)
    assert weights == pytest.approx(expected.tolist(), rel=1e-12)
    assert tempered_weights([0.0, 1e300], 1.0) == [1.0, 0.0]


# --- Systematic resampling -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_counts_are_unbiased_and_nearly_deterministic(seed):
    weights = torch.softmax(2 * normal(7, seed=seed), 0).tolist()
    points = 5000
    drawn = [systematic_counts(weights, (n + 0.5) / points) for n in range(points)]
    mean = torch.tensor(drawn, dtype=torch.float64).mean(0)
    torch.testing.assert_close(mean, 7 * torch.tensor(weights, dtype=torch.float64), rtol=0, atol=2 / points)
    for counts in drawn[::100]:
        assert sum(counts) == 7
        assert all(int(7 * w) <= n <= int(7 * w) + 1 for n, w in zip(counts, weights, strict=True))


def test_counts_at_the_edges():
    assert systematic_counts([0.25] * 4, 0.0) == [1, 1, 1, 1]
    assert systematic_counts([0.25] * 4, 0.999) == [1, 1, 1, 1]
    assert systematic_counts([1.0, 0.0, 0.0], 0.4) == [3, 0, 0]
    assert systematic_counts([0.0, 0.0, 1.0], 0.4) == [0, 0, 3]


# --- Lineages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "losses", "roots", "expected"),
    [
        ([4, 0, 0, 0], [1.0, 3.0, 2.0, 4.0], [0, 1, 2, 3], [3, 0, 1, 0]),  # the second best
        ([2, 1, 0, 1], [1.0, 3.0, 2.0, 4.0], [0, 1, 2, 3], [1, 1, 1, 1]),  # from the one drawn most often
        ([2, 2, 0, 0], [1.0, 2.0, 3.0, 4.0], [0, 0, 2, 3], [2, 1, 1, 0]),  # a copy of the best is no other lineage
        ([4, 0, 0, 0], [1.0, 2.0, 3.0, 4.0], [0, 0, 0, 0], [3, 1, 0, 0]),  # all of one root
        ([2, 1, 1, 0], [1.0, 2.0, 3.0, 4.0], [0, 1, 2, 3], [2, 1, 1, 0]),  # nothing to do
        ([0, 0, 3], [1.0, 2.0, 3.0], [0, 1, 2], [1, 1, 1]),
    ],
)
def test_two_lineages_are_kept(counts, losses, roots, expected):
    assert keep_two_lineages(counts, losses, roots) == expected


def test_two_lineages_survive_many_rounds():
    hook, state = resampling(sigma=1e9, last_level=1000), dataclasses.replace(full_state(5), sigma=1.0, step=0)
    alive = torch.zeros(5, dtype=torch.bool)
    state = dataclasses.replace(
        state, diverged=alive, masked=alive, particle_id=torch.arange(5), parent_id=torch.full((5,), -1)
    )
    for step in range(100):
        loss = torch.tensor([1e-2 * (i + 1) ** 2 for i in range(5)], dtype=torch.float64)
        state = hook.before_renoise(dataclasses.replace(state, step=step, loss=loss), Info())
        roots = {hook.roots.get(i, i) for i in state.ids}
        assert len(roots) >= 2 and len(set(state.ids)) == 5
    assert len(roots) == 2  # and the others died out


def test_children_of_a_pruning_are_of_their_parents_lineage():
    alive = torch.zeros(4, dtype=torch.bool)
    ids, parents = torch.tensor([0, 1, 4, 5]), torch.tensor([-1, -1, 0, 1])
    losses = torch.tensor([70.0, 90.0, 70.5, 91.0], dtype=torch.float64)
    state = dataclasses.replace(full_state(4), sigma=1.0, step=0, diverged=alive, masked=alive)
    hook = resampling(sigma=1e9, last_level=1000)
    after = hook.before_renoise(dataclasses.replace(state, particle_id=ids, parent_id=parents, loss=losses), Info())
    assert {hook.roots.get(i, i) for i in after.ids} == {0, 1}


# --- The hook --------------------------------------------------------------------------------------------------------


def test_copies_replace_particles_under_new_ids():
    _, rows, seen = resampled_run(resampling())
    before = resampled_run()[2]["before_renoise"]
    row = rows[0]
    level = row["step"]
    old, new = before[level], seen["before_renoise"][level]
    assert row["sigma"] <= 1.5 < before[level - 1].sigma and row["particle_ids"] == IDS
    assert row["losses"] == pytest.approx(old.loss.tolist())
    assert row["copied"] and sum(row["counts"]) == 6
    assert row["weights"] == pytest.approx(tempered_weights([v / 0.02 for v in row["losses"]], row["beta"]))
    assert row["effective_sample_size"] == pytest.approx(3, abs=1e-3)
    children = {c["child"]: c for c in row["copied"]}
    assert list(children) == list(range(6, 6 + len(children)))
    for place, number in enumerate(new.ids):
        if number in children:
            copy = children[number]
            assert copy["replaced"] == place and new.parent_id[place] == copy["parent"]
            assert row["counts"][place] == 0 and row["counts"][copy["parent"]] > 1
            assert_same(new[[place]], dataclasses.replace(old[[copy["parent"]]], **own_ids(new, place)))
        else:
            assert number == place and new.parent_id[place] == -1
            assert_same(new[[place]], old[[place]])


def own_ids(state, place):
    return {"particle_id": state.particle_id[[place]], "parent_id": state.parent_id[[place]]}


def test_survivors_go_on_as_without_and_copies_part():
    only = resampled_run(resampling(sigma=1.5, sigma_min=0.8))
    (row,) = only[1]
    plain = run(settings(), ids=IDS)
    survivors = [i for i, number in enumerate(only[0].ids) if number < 6]
    assert 2 <= len(survivors) < 6
    assert_same(only[0][survivors], plain, survivors)
    for copy in row["copied"]:
        place = only[0].ids.index(copy["child"])
        twin = only[0].ids.index(copy["parent"])
        assert (only[0].z0_y[place] - only[0].z0_y[twin]).abs().max() > 1e-3


def test_ids_go_on_over_levels():
    state, rows, _ = resampled_run(resampling(sigma=9.0))
    children = [copy["child"] for row in rows for copy in row["copied"]]
    assert len(rows) == LEVELS - 1 and children == list(range(6, 6 + len(children)))
    assert len(set(state.ids)) == 6


def test_neither_the_last_level_nor_early_ones_resample():
    assert {row["step"] for row in resampled_run(resampling(sigma=100.0))[1]} == {0, 1, 2, 3}
    assert {row["step"] for row in resampled_run(resampling(sigma=100.0, from_level=2))[1]} == {2, 3}
    window = [k for k in range(LEVELS - 1) if 0.7 <= PATH[k] <= 2.5]
    assert [row["step"] for row in resampled_run(resampling(sigma=2.5, sigma_min=0.7))[1]] == window
    assert 0 < len(window) < LEVELS - 1


@pytest.mark.parametrize("hook", [{"sigma": 0.0}, {"sigma": 1e9, "from_level": LEVELS}], ids=["off", "never"])
def test_off_is_the_plain_run(hook):
    state, rows, _ = resampled_run(resampling(**hook))
    assert rows == []
    assert_same(state, run(settings(), ids=IDS))


def test_two_particles_are_left_alone():
    state, rows, _ = resampled_run(resampling(sigma=100.0), ids=[0, 1])
    assert rows == []
    assert_same(state, run(settings(), ids=[0, 1]))


def test_diverged_and_masked_particles_are_left_alone():
    state = dataclasses.replace(full_state(8), sigma=1.0, step=1, particle_id=torch.arange(8))
    info = Info()
    after = resampling(sigma=2.0).before_renoise(state, info)
    out = [i for i in range(8) if bool(state.diverged[i] | state.masked[i])]
    assert info.rows["resampling"][0]["particle_ids"] == [i for i in range(8) if i not in out]
    assert_same(after[out], state, out)


def test_the_draw_belongs_to_image_and_level():
    streams = ParticleStreams(3, 5)
    state = dataclasses.replace(full_state(5), streams=streams)
    draws = [resampling()._uniform(dataclasses.replace(state, step=k)) for k in (0, 1, 0)]
    (generator,) = streams.generators([SHARED], "resample", 1, CPU)
    assert draws[1] == torch.rand((), generator=generator, dtype=torch.float64).item()
    assert draws[0] == draws[2] != draws[1]


def test_pruning_comes_first_and_its_children_take_part():
    prune = pruning.Pruning(*problem(), pruning.Settings(keep=3, branch=3.0), PATH, 1)
    state, rows, _ = resampled_run(resampling(sigma=100.0, from_level=2), prune)
    assert [row["step"] for row in rows] == [2, 3]
    assert len(rows[0]["particle_ids"]) == 6 and set(rows[0]["particle_ids"]) >= {6, 7, 8}
    assert min(copy["child"] for row in rows for copy in row["copied"]) == 9
    assert len(set(state.ids)) == 6


# --- Keys ------------------------------------------------------------------------------------------------------------


def problems(num_samples=4, **keys):
    checks = Checks()
    check_hooks(HookKeys(**keys), num_samples, checks)
    return checks.problems


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"resample_sigma": 1.01}, ("resample_sigma=1.01", "at most 1", "wrong basin", "0.5")),
        ({"resample_sigma": -0.1}, ("resample_sigma=-0.1", "at least 0")),
        ({"resample_sigma": float("nan")}, ("resample_sigma=nan",)),
        ({"resample_sigma_min": -1.0}, ("resample_sigma_min=-1",)),
        ({"resample_sigma": 0.5, "resample_sigma_min": 0.6}, ("resample_sigma_min=0.6", "resample_sigma=0.5")),
        ({"resample_sigma": 0.5, "num_samples": 2}, ("num_samples=2", "two lineages")),
        ({"resample_sigma": 0.5, "pruning_step": 500}, ("pruning_keep=2", "always kept")),
    ],
)
def test_values_that_cannot_work_are_refused(keys, words):
    (message,) = problems(**keys)
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    "keys",
    [
        {"resample_sigma": 1.0},
        {"resample_sigma": 0.5, "num_samples": 3},
        {"resample_sigma_min": 0.6},
        {"resample_sigma": 0.5, "pruning_step": 500, "pruning_keep": 3},
        {"resample_sigma": 0.5, "pruning_step": 500, "pruning_branch": 1.0},
    ],
)
def test_others_are_not(keys):
    assert problems(**keys) == []


def test_the_hook_gets_what_the_keys_say():
    plan = planned(resample_sigma=1.5, resample_sigma_min=0.4, pruning_step=800, pruning_keep=3, num_samples=5)
    hooks = plan.hooks(PhaseClock(CPU))
    (hook,) = [h for h in hooks if isinstance(h, Resampling)]
    assert dataclasses.asdict(hook.settings) == {"sigma": 1.5, "sigma_min": 0.4}
    assert (hook.noise_sigma, hook.from_level, hook.last_level) == (problem()[1].noise_sigma, 2, 4)
    assert not any(isinstance(h, Resampling) for h in planned().hooks(PhaseClock(CPU)))


def test_a_range_without_levels_is_refused():
    with pytest.raises(SettingsError, match=r"resample_sigma=0\.5, resample_sigma_min=0\.2: no level lies there"):
        planned(resample_sigma=0.5)


# --- The command line ------------------------------------------------------------------------------------------------


def test_a_run_records_what_was_resampled(tiny_prior, image_folder, tmp_path, no_sheets):
    model = ("model=embedded", f"model.path={tiny_prior}", "data=folder", f"data.dir={image_folder}", "data.end_id=1")
    keys = ("resample_sigma=1", "resample_sigma_min=0", "sampler.annealing.num_steps=6", "num_samples=4")
    outcome = command("posterior_sample", *model, *QUICK, f"save_dir={tmp_path}", "name=again", *keys)
    assert outcome.status == 0, outcome.err
    metrics = metrics_schema.load(tmp_path / "again" / "metrics.json")
    (image,) = metrics["resampling"]["per_image"]
    (row,) = image["per_step"]
    assert row["step"] == 4 and row["copied"] and image["image_id"] == 0
    survivors = [i for i, n in zip(row["particle_ids"], row["counts"], strict=True) if n]
    record = json.loads((tmp_path / "again" / "records" / "00000.json").read_text())
    assert sorted(record["particle_ids"]) == survivors + [copy["child"] for copy in row["copied"]]
    assert metrics["metadata"]["num_samples_final"] == 4
