"""All hooks on the analytic problem: off is the plain run, and what they do together."""

import pytest
import torch
from planned_runs import EVERY, IDS, NEUTRAL, OPTIMISE, PATH, PRUNE, REPEL, planned, planned_run
from sampler_support import LEVELS, assert_same, loop, measurement, problem, run, settings

from particledaps.streams import ParticleStreams
from sampler import Info

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
    record = plan.record(info, [])["repulsion"]
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
    state, info, *_, plan = planned_run(**{**OPTIMISE, **EVERY, "optimization_step": 600}, optimization_accept="loss")
    record, rows = plan.record(info, [2, 0])["optimization"], info.rows["optimization"]
    assert record["iterations"] == [sum(row["iterations"][i] for row in rows) for i in (2, 0)]
    assert record["initial_loss"] == [rows[0]["initial_loss"][i] for i in (2, 0)]
    assert record["final_loss"] == [rows[-1]["final_loss"][i] for i in (2, 0)]
    assert record["reason"] == [rows[-1]["reason"][i] for i in (2, 0)]
    assert len(record["per_step"]) == 3
    assert plan.record(Info(), [0])["optimization"] is None


def test_three_hooks_at_once_leave_each_particle_to_itself_after_the_break():
    """Repulsion binds particles together; afterwards each one goes on as if it were alone."""
    keys = {**REPEL, **PRUNE, **OPTIMISE, **EVERY, "repulsion_sigma_break": PATH[2].item()}
    together, *_ = planned_run(**keys, pruning_keep=4)
    pruned, _, _, recorder, _ = planned_run(**keys, pruning_keep=2)
    rows = [together.ids.index(i) for i in pruned.ids]
    assert len(pruned) == 2
    assert_same(pruned, together, rows, exact=False)


@pytest.mark.parametrize(
    "keys",
    [
        {**PRUNE, "pruning_keep": 1},
        {"restart_rounds": 2, "restart_lineages": 2, "restart_agreement": 1.0},
        {"resample_sigma": 1.5, "resample_sigma_min": 0.0},
        {**OPTIMISE, **EVERY},
        REPEL,
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_one_hook_serves_image_after_image(keys):
    """What a hook remembers belongs to one image: the second is as it would be with a hook of its own."""

    def results(hooks, images):
        infos = [Info() for _ in images]
        pairs = list(zip(images, infos, strict=True))
        states = [loop(settings(), hooks()).sample(measurement(), ParticleStreams(42, i), IDS, log) for i, log in pairs]
        return states[-1], infos[-1]

    made = [hook for hook in planned(**keys).built.values() if hook is not None]
    state, info = results(lambda: made, [0, 1])
    alone, own = results(lambda: [hook for hook in planned(**keys).built.values() if hook is not None], [1])
    assert_same(state, alone)
    assert without_seconds(info.rows) == without_seconds(own.rows) != {}


def without_seconds(rows):
    return {kind: [{k: v for k, v in row.items() if k != "seconds"} for row in own] for kind, own in rows.items()}
