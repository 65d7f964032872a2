"""From keys to hooks, phases and the feature space."""

import dataclasses

import pytest
import torch
from analytic import F64, normal
from planned_runs import CPU, EVERY, OPTIMISE, PATH, PRUNE, REPEL, plan_for, planned, planned_run
from sampler_support import measurement, problem

from particledaps.checks import Checks, SettingsError
from particledaps.evaluation.orientation import latent_plausibility, posterior_energy
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.particles.feature_spaces import ImageSpace, LatentSpace, build_feature_space
from particledaps.runs.clock import PhaseClock
from particledaps.settings.hook_keys import cut
from pruning import Pruning
from repulsion import Repulsion, Settings
from resample_opt import LatentOptimization
from restarts import Restarts
from run_settings import HookKeys, check_hooks

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
    hooks = plan.hooks(PhaseClock(CPU))
    repulsion, pruning, optimisation = (
        next(h for h in hooks if isinstance(h, kind)) for kind in (Repulsion, Pruning, LatentOptimization)
    )
    assert [h for h in hooks if h in (repulsion, pruning, optimisation)] == [repulsion, pruning, optimisation]
    assert dataclasses.asdict(repulsion.settings) == {
        "scale": 0.4,
        "unit": "raw",
        "sigma_break": 0.01,
        "schedule": "cosine",
        "on": "z_t",
        "features": "latent",
        "kernel": "plain",
        "dino_model": "vit_small_patch16_224.dino",
        "dino_path": None,
        "log": True,
    }
    assert repulsion.stop_at == 401
    assert dataclasses.asdict(pruning.settings) == {
        "step": 799,
        "keep": 3,
        "rule": "diverse",
        "mode": "slice",
        "tolerance": 1.5,
        "close": 0.2,
        "branch": 2.0,
    }
    assert pruning.at_level == 2
    assert dataclasses.asdict(optimisation.settings) == {
        "step": 401,
        "when": "every",
        "lr": 0.3,
        "max_iters": 7,
        "window": 5,
        "weight_decay": 0.2,
        "prior_sigma": 0.15,
        "tau": None,
        "accept": "floor",
        "best": None,
        "twins": False,
        "method": "adamw",
        "gain": 0.0,
    }
    assert optimisation.from_level == 3 and optimisation.descent.tau == problem()[1].noise_sigma


def test_rounds_get_what_the_keys_say():
    plan = planned(
        restart_rounds=3,
        restart_keep=2,
        restart_children=5,
        restart_lineages=3,
        restart_agreement=25.0,
        restart_refinements=2,
        restart_sigmas=[PATH[2].item(), 1e-9],
        restart_steps=6,
        restart_polish=4,
        restart_rule="posterior",
        optimization_step=0,
        optimization_best=1,
        optimization_twins=True,
        optimization_prior_sigma=0.15,
        optimization_tau=0.7,
        optimization_lr=0.02,
        num_samples=9,
    )
    rounds, optimisation = (
        next(h for h in plan.hooks(PhaseClock(CPU)) if isinstance(h, kind)) for kind in (Restarts, LatentOptimization)
    )
    assert dataclasses.asdict(rounds.settings) == {
        "rounds": 3,
        "keep": 2,
        "rule": "posterior",
        "children": 5,
        "sigmas": (PATH[2].item(), 1e-9),
        "steps": 6,
        "conjugate": 0,
        "polish": 4,
        "lineages": 3,
        "agreement": 25.0,
        "refinements": 2,
    }
    assert rounds.first_child_id == 18 and rounds.levels == [2, len(PATH) - 2]
    assert (optimisation.settings.best, optimisation.settings.twins) == (1, True)
    polished = dataclasses.asdict(rounds.polish.keywords["settings"])
    assert {k: polished[k] for k in ("max_iters", "lr", "tau", "prior_sigma")} == {
        "max_iters": 4,
        "lr": 0.02,
        "tau": 0.7,
        "prior_sigma": 0.15,
    }
    z, loss = normal(3, *problem()[0].latent_shape), torch.tensor([1.0, 2.0, 5.0], dtype=F64)
    prior_part = posterior_energy(plan.setup.prior, latent_plausibility(plan.setup.prior, z), 0 * loss, 0.7)
    torch.testing.assert_close(rounds.energy(z, loss), prior_part + loss / (2 * 0.7**2))
    plain = planned(restart_rounds=3).hooks(PhaseClock(CPU))
    rounds = next(h for h in plain if isinstance(h, Restarts))
    assert rounds.energy is None and rounds.polish is None and rounds.agree is None


def test_lineages_that_show_opposite_twins_agree():
    plan = plan_for(problem()[0], PhaseRetrieval(), restart_rounds=1, restart_lineages=2)
    rounds = next(h for h in plan.hooks(PhaseClock(CPU)) if isinstance(h, Restarts))
    x = normal(1, 3, 8, 8, dtype=torch.float32).clamp(-1, 1)
    assert rounds.agree(x, torch.cat([x.flip((-2, -1)), -x])).tolist() == [
        pytest.approx(80.0),
        pytest.approx(0.0, abs=10),
    ]


def test_polish_belongs_to_no_level(monkeypatch):
    """Seconds of the polish between two rounds are not those of the round's first level."""
    now = [1.0]

    def polish(self, state):
        now[0] += 100
        return state

    monkeypatch.setattr("particledaps.runs.clock.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("restarts.Restarts._polish", polish)
    clock = planned_run(restart_rounds=2)[2]
    assert set(clock.step_seconds) == {0} and clock.phases["sampling"].seconds == 300


def test_an_operator_without_halves_is_refused_before_anything_runs():
    keys = {"optimization_step": 400, "optimization_accept": "split"}
    with pytest.raises(SettingsError, match="optimization_accept=split: the operator matrix has no two independent"):
        planned(**keys)
    assert plan_for(problem()[0], PhaseRetrieval(), **keys)


@pytest.mark.parametrize("keys", [{"optimization_twins": True}, {"optimization_best": 1}])
def test_what_belongs_to_an_optimisation_that_is_off_is_refused(keys):
    checks = Checks()
    check_hooks(HookKeys(**keys), 4, checks)
    assert ["needs optimization_step of at least 0" in problem for problem in checks.problems] == [True]


def test_tau_of_the_optimisation_can_be_given():
    hooks = planned(**OPTIMISE, optimization_tau=0.7).hooks(PhaseClock(CPU))
    assert next(h for h in hooks if isinstance(h, LatentOptimization)).descent.tau == 0.7


def test_expected_loss_is_the_noise_floor_and_the_misfit_of_the_prior():
    prior, operator = problem()
    prior = dataclasses.replace(prior, misfit_excess={"matrix": (3.0, 0.4), "other": (99.0, 99.0)})
    plan = plan_for(prior, operator, **PRUNE, **OPTIMISE)
    hooks = plan.hooks(PhaseClock(CPU))
    floor = operator.noise_floor(measurement())
    pruning, optimisation = (next(h for h in hooks if isinstance(h, k)) for k in (Pruning, LatentOptimization))
    for hook in (pruning, optimisation):
        expected = hook.expected(hook.prior, hook.operator, measurement())
        assert expected.mean == pytest.approx(floor.mean.item() + 3.0)
        assert expected.std == pytest.approx((floor.std.item() ** 2 + 0.4**2) ** 0.5)


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


# --- The feature space -----------------------------------------------------------------------------------------------


def space_of(**keys):
    return build_feature_space(cut("repulsion", Settings, HookKeys(**keys)), problem()[0], PhaseRetrieval(), CPU)


def test_feature_space_is_the_one_that_is_asked_for(monkeypatch):
    monkeypatch.setattr("particledaps.priors.dino.dino_weights", lambda model, path: None)
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
    assert planned(repulsion_features="dino").built["repulsion"] is None
