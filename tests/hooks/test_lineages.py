"""Rounds of children in several lines of descent."""

import pytest
import torch
from sampler_support import LEVELS, Recorder, assert_same, loop, measurement, problem, settings
from test_restarts import IDS, Spoil, losses, restarted_run, restarts

from particledaps.checks import SettingsError
from particledaps.streams import ParticleStreams
from run_settings import RunSettings, validate
from sampler import Info


def lineages(rounds=2, count=2, agree=None, energy=None, **changes):
    return restarts(rounds, None, energy, agree, **({"children": 2, "lineages": count} | changes))


def always(db):
    return lambda x, other: torch.full((len(other),), db)


def run(hook, *before):
    info, recorder = Info(), Recorder()
    state = loop(settings(), [*before, hook, recorder]).sample(measurement(), ParticleStreams(42, 0), IDS, info)
    return state, info.rows.get("restarts", []), info.rows.get("restarts_end", []), recorder.seen


def founders(rows, of):
    """The first particle of each line of descent."""
    parents = {pair["child"]: pair["parent"] for row in rows for pair in row["branched"]}
    line = []
    for own in of:
        while own in parents:
            own = parents[own]
        line.append(own)
    return line


def test_with_one_lineage_parent_and_children_of_the_last_round_stay():
    """The final optimisation chooses among them; nothing is asked of an agreement."""
    plain = losses(restarted_run()[0])
    state, rows, ends, _ = run(lineages(rounds=1, count=1, agree=always(99.0), agreement=1.0))
    best = plain.index(min(plain))
    assert [row["kept"] for row in rows] == [[best]] and state.ids == [best, 8, 9]
    assert ends == [] and "agreement_db" not in rows[0]


def test_particles_compete_within_their_lineage():
    plain = losses(restarted_run()[0])
    _, (first, second), _, seen = run(lineages())
    assert sorted(first["kept"]) == [min((0, 1), key=plain.__getitem__), min((2, 3), key=plain.__getitem__)]
    assert [pair["parent"] for pair in first["branched"]] == [i for i in first["kept"] for _ in range(2)]
    assert [plain[i] for i in first["kept"]] == sorted(plain[i] for i in first["kept"])
    assert sorted(i // 2 for i in founders([first], second["kept"])) == [0, 1]
    assert {len(s.ids) for s in seen["before_ode"][LEVELS:]} == {4}


def test_the_best_particle_of_all_lineages_is_left():
    state, rows, (end,), _ = run(lineages())
    assert end["rounds"] == len(rows) == 2
    best = min(zip(end["losses"], end["particle_ids"], strict=True))
    assert end["kept"] == state.ids == [best[1]]
    assert losses(state) == pytest.approx([best[0]])
    assert len(end["particle_ids"]) == 2 * (1 + 2)


def test_two_lineages_that_agree_end_the_rounds():
    plain = losses(restarted_run()[0])
    state, rows, (end,), seen = run(lineages(agree=always(30.0), agreement=28.0))
    assert rows == [] and len(seen["before_ode"]) == LEVELS
    assert (end["rounds"], end["agreement_db"], state.ids) == (0, 30.0, [plain.index(min(plain))])
    state, rows, (end,), _ = run(lineages(agree=always(27.9), agreement=28.0))
    assert len(rows) == end["rounds"] == 2
    assert [row["agreement_db"] for row in [*rows, end]] == pytest.approx([27.9] * 3)


def test_the_best_lineage_is_refined_after_an_agreement():
    """Two rounds more of its plain children; what comes of them is compared with the image that agreed."""
    seen = []

    def agree(x, other):
        seen.append((x, other))
        return torch.full((len(other),), 39.0 - 9 * len(seen))

    hook = lineages(rounds=9, count=3, agreement=28.0, refinements=2, conjugate=2, agree=agree)
    hook.energy = lambda z, loss: torch.arange(len(z)) + 0.0
    state, rows, (end,), _ = run(hook)
    assert [row["kept"] for row in rows] == [[0], [0]] and state.ids == [0]
    assert [row["conjugated"] for row in rows] == [[], []]
    assert [row["agreement_db"] for row in [*rows, end]] == [30.0, 21.0, 12.0]
    assert (end["rounds"], end["agreed"], len(end["particle_ids"])) == (2, True, 3)
    first, *later = (other for _, other in seen)
    assert len(first) == 2 and all(torch.equal(other, first[:1]) for other in later)


def test_only_the_lineage_that_agreed_is_left():
    """Though a particle of another lineage has a lower energy than its second best."""
    hook = lineages(count=2, keep=2, agree=always(30.0), agreement=28.0)
    hook.energy = lambda z, loss: torch.tensor([0.0, 9.0, 1.0, 2.0])
    state, rows, (end,), _ = run(hook)
    assert (rows, state.ids, end["kept"]) == ([], [0, 1], [0, 1])


def test_rounds_without_an_agreement_end_unrefined():
    _, rows, (end,), _ = run(lineages(agree=always(20.0), agreement=28.0, refinements=2))
    assert (len(rows), end["rounds"], end["agreed"]) == (2, 2, False)


def test_without_a_threshold_agreement_is_logged_only():
    _, rows, (end,), _ = run(lineages(agree=always(99.0)))
    assert len(rows) == 2 and end["agreement_db"] == 99.0 and end["agreed"] is None


def test_agreement_is_that_of_the_best_image_with_the_nearest_other_lineage():
    """Three lineages of particles 0 and 1, 2, and 3."""
    energies, calls = torch.tensor([1.0, 2.0, 9.0, 5.0]), []

    def agree(x, other):
        calls.append((x, other))
        return torch.tensor([3.0, 5.0])

    hook = lineages(rounds=0, count=3, agree=agree, energy=lambda z, loss: energies)
    plain = restarted_run()[0]
    _, _, (end,), _ = run(hook)
    ((x, other),) = calls
    decode = problem()[0].decode
    assert torch.equal(x, decode(plain.z0_y[[0]]))
    assert torch.equal(other, decode(plain.z0_y[[3, 2]]))
    assert end["agreement_db"] == 5.0


@pytest.mark.parametrize("field", ["diverged", "masked"])
def test_particles_that_are_out_belong_to_no_lineage(field):
    state, rows, (end,), _ = run(lineages(agree=always(20.0), agreement=28.0), Spoil(field, [0, 1]))
    assert sorted(rows[0]["kept"]) == [2, 3]
    assert rows[0]["diverged"] == ([0, 1] if field == "diverged" else [])
    assert end["agreed"] is False and founders(rows, state.ids)[0] in (2, 3)


def test_a_lone_particle_has_nobody_to_agree_with():
    _, rows, (end,), _ = run(lineages(agree=always(99.0), agreement=1.0), Spoil("diverged", [0, 1, 3]))
    assert len(rows) == 2 and {row["agreement_db"] for row in [*rows, end]} == {None}
    assert end["agreed"] is None


def test_turned_children_are_the_last_of_each_lineage():
    hook = lineages(rounds=2, conjugate=1, energy=lambda z, loss: torch.arange(len(z)) + 0.0)
    hook._conjugate = lambda children, turned: children
    _, (first, second), _, _ = run(hook)
    assert first["conjugated"] == []
    assert first["kept"] == second["kept"] == [0, 2]
    assert [pair["parent"] for pair in second["branched"]] == [0, 0, 2, 2]
    assert second["conjugated"] == [pair["child"] for pair in second["branched"]][1::2]


def test_lineages_are_reproducible():
    assert_same(run(lineages())[0], run(lineages())[0])


REFUSED = {
    "none": ({"restart_lineages": 0}, "restart_lineages=0: must be at least 1"),
    "too many": ({"restart_lineages": 5}, "restart_lineages=5: there are only num_samples=4 particles"),
    "high": ({"restart_lineages": 2, "restart_agreement": 81.0}, "restart_agreement=81: .* at most 80"),
    "copies": ({"restart_lineages": 2, "resample_sigma": 0.5}, "resample_sigma=0.5: it copies particles from lineage"),
    "branches": (
        {"restart_lineages": 2, "pruning_step": 400, "pruning_branch": 3.0},
        "pruning_branch=3: it copies particles from lineage",
    ),
    "crossed": ({"restart_lineages": 2, "symmetry_moves": ["crossover"]}, "crossover: it copies particles from"),
    "pruned": (
        {"restart_lineages": 3, "pruning_step": 400, "pruning_keep": 2},
        "pruning_keep=2: leaves fewer particles than restart_lineages=3",
    ),
    "zero": ({"restart_lineages": 2, "restart_agreement": 0.0}, "restart_agreement=0: must be greater than 0"),
    "refined": ({"restart_refinements": 2}, "restart_refinements=2: they follow an agreement"),
    "unrefined": ({"restart_refinements": -1}, "restart_refinements=-1: must be at least 0"),
    "alone": ({"restart_agreement": 28.0}, "restart_agreement=28: one lineage has none to agree with"),
}


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_values_that_no_lineages_could_run_with(keys, message):
    with pytest.raises(SettingsError, match=message):
        validate(RunSettings(restart_rounds=3, num_samples=4, **keys))
