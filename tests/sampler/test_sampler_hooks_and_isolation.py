import dataclasses

import numpy as np
import pytest
import torch
from analytic import F64, MatrixOperator, latent, normal
from sampler_support import (
    INNER_MIN,
    INNER_STEPS,
    KERNELS,
    LEVELS,
    MATRIX,
    SIGMA_MAX,
    SIGMA_MIN,
    Recorder,
    assert_same,
    denoiser_map,
    each_kernel,
    edm_levels,
    loop,
    measurement,
    ode_map,
    problem,
    run,
    settings,
    tensor_fields,
)

from particledaps.diffusion.mcmc import ChainSettings
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams
from sampler import Hook, Info, LatentDAPS

# --- Hooks -----------------------------------------------------------------------------------------------------------


@each_kernel
def test_hooks_that_do_nothing_change_nothing(chain):
    plain = run(settings(chain))
    assert_same(run(settings(chain), [Hook(), Recorder(), Hook()]), plain)


def test_levels_moments_and_times():
    recorder, levels = Recorder(), edm_levels(LEVELS, SIGMA_MAX, SIGMA_MIN)
    run(settings(), [recorder])
    for moment in ("before_ode", "after_mcmc", "before_renoise"):
        states = recorder.seen[moment]
        assert [s.step for s in states] == [0, 1, 2, 3, 4]
        assert [s.t for s in states] == pytest.approx([1000, 800, 600, 400, 200])
        assert [s.sigma for s in states] == pytest.approx(levels[:-1], rel=1e-12)
    assert len(recorder.seen["at_end"]) == 1


@pytest.mark.parametrize("levels", [5, 10, 30, 50])
def test_times_are_exact_where_they_are_whole(levels):
    """``t <= 300`` must hold at level 7 of 10."""
    recorder = Recorder()
    run(settings(ChainSettings("langevin", 1, 0.02), path=edm_path(levels, 4.0, 0.5)), [recorder], ids=[0])
    for state in recorder.seen["before_ode"]:
        assert state.t == pytest.approx(1000 * (1 - state.step / levels), abs=1e-9)
        if 1000 * state.step % levels == 0:
            assert state.t == 1000 * (levels - state.step) // levels


def test_state_between_levels_is_what_its_fields_say():
    recorder = Recorder()
    run(settings(), [recorder])
    streams, levels = ParticleStreams(42, 0), edm_levels(LEVELS, SIGMA_MAX, SIGMA_MIN)
    before, after = recorder.seen["before_ode"], recorder.seen["after_mcmc"]
    start = streams.normal([0, 1, 2, 3], "start", 0, before[0].z)
    torch.testing.assert_close(before[0].z, SIGMA_MAX * start, rtol=1e-12, atol=0)
    for level in range(LEVELS):
        gain, shift = ode_map(levels[level], "euler")
        z0_hat = before[level].z.flatten(1).numpy() @ gain.T + shift
        np.testing.assert_allclose(after[level].z0_hat.flatten(1), z0_hat, rtol=1e-9, atol=1e-9)
        if level + 1 < LEVELS:
            noise = streams.normal([0, 1, 2, 3], "renoise", level, before[0].z)
            expected = after[level].z0_y + levels[level + 1] * noise
            torch.testing.assert_close(before[level + 1].z, expected, rtol=1e-12, atol=1e-12)
    last = recorder.seen["at_end"][0]
    assert torch.equal(last.z, last.z0_y)


def test_hooks_run_in_order_and_their_state_is_used():
    calls = []

    class Shift(Hook):
        def __init__(self, name, amount):
            self.name, self.amount = name, amount

        def before_renoise(self, state, info):
            calls.append(self.name)
            info.add("shift", step=state.step, name=self.name)
            return dataclasses.replace(state, z0_y=state.z0_y * self.amount + 1)

    info = Info()
    shifted = loop(settings(), [Shift("first", 2.0), Shift("second", 3.0)])
    state = shifted.start(measurement(), ParticleStreams(42, 0), [0, 1])
    after = next(shifted.levels(state, info))
    plain = next(loop(settings()).levels(state, Info()))
    assert calls == ["first", "second"]
    torch.testing.assert_close(after.z0_y, (2 * plain.z0_y + 1) * 3 + 1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after.z - after.z0_y, plain.z - plain.z0_y, rtol=1e-9, atol=1e-12)
    assert info.rows == {"shift": [{"step": 0, "name": "first"}, {"step": 0, "name": "second"}]}


class Drift(Hook):
    """Sets a drift at one level."""

    def __init__(self, step, term, scale):
        self.step, self.term, self.scale = step, term, scale

    def before_ode(self, state, info):
        return dataclasses.replace(state, drift=(self.term, self.scale)) if state.step == self.step else state


@pytest.mark.parametrize("scale", [0.3, torch.tensor([0.0, 0.3, -1.0, 2.0], dtype=F64)], ids=["number", "per_particle"])
def test_drift_of_a_hook_acts_in_its_level_only(scale):
    """``D + s sigma^2 r`` in the Euler steps of level 1, the plain ODE in all others."""
    term, recorder = latent(normal(4, 3, seed=5)), Recorder()
    run(settings(), [Drift(1, term, scale), recorder])
    factor = torch.as_tensor(scale, dtype=F64).expand(4).reshape(4, 1)
    for level, sigma in enumerate(edm_levels(LEVELS, SIGMA_MAX, SIGMA_MIN)[:-1]):
        z = recorder.seen["before_ode"][level].z.flatten(1)
        nodes = edm_levels(INNER_STEPS, sigma, INNER_MIN)
        for here, there in zip(nodes[:-1], nodes[1:], strict=True):
            gain, shift = (torch.from_numpy(a) for a in denoiser_map(here))
            denoised = z @ gain.T + shift + (factor * here**2 * term.flatten(1) if level == 1 else 0)
            z = z + (there - here) / here * (z - denoised)
        torch.testing.assert_close(recorder.seen["after_mcmc"][level].z0_hat.flatten(1), z, rtol=1e-9, atol=1e-9)


def test_drift_leaves_no_trace_in_the_next_run():
    drift = Drift(0, latent(normal(4, 3, seed=5)), 0.5)
    used = loop(settings(), [drift])
    plain = run(settings())
    repelled = used.sample(measurement(), ParticleStreams(42, 0), range(4))
    assert not torch.equal(repelled.z0_y, plain.z0_y)
    drift.step = -1
    assert_same(used.sample(measurement(), ParticleStreams(42, 0), range(4)), plain)


# --- Divergence ------------------------------------------------------------------------------------------------------


class PoisonedModule(torch.nn.Module):
    """A denoiser that answers NaN for one particle in one call."""

    def __init__(self, denoiser, call, particle):
        super().__init__()
        self.denoiser, self.remaining, self.particle = denoiser, call, particle

    def forward(self, z, sigma):
        result = self.denoiser(z, sigma).clone()
        self.remaining -= 1
        if self.remaining == -1:
            result[self.particle] = torch.nan
        return result


class PoisonedOperator(MatrixOperator):
    """Loss and gradient NaN for one particle in one call."""

    def __init__(self, matrix, call, particle):
        super().__init__(matrix)
        self.remaining, self.particle = call, particle

    def objective(self, y):
        plain = super().objective(y)

        def evaluate(x):
            loss, gradient = plain(x)
            self.remaining -= 1
            if self.remaining == -1:
                loss[self.particle], gradient[self.particle] = torch.nan, torch.nan
            return loss, gradient

        return evaluate


class PoisonedHook(Hook):
    """Puts NaN into one field of one particle at one level."""

    def __init__(self, moment, name, step, particle):
        def poison(state, info):
            if state.step != step:
                return state
            value = getattr(state, name).clone()
            value[particle] = torch.nan
            return dataclasses.replace(state, **{name: value})

        setattr(self, moment, poison)


def assert_only_row_1_diverged(hurt, healthy):
    assert hurt.diverged.tolist() == [False, True, False, False]
    for name in tensor_fields(hurt):
        value = getattr(hurt, name)
        assert torch.isfinite(value).all(), name
        assert torch.equal(value[[0, 2, 3]], getattr(healthy, name)[[0, 2, 3]]), name


@each_kernel
@pytest.mark.parametrize("level", [0, 2, 4])
def test_nan_from_the_denoiser_stays_with_its_particle(chain, level):
    prior, _ = problem()
    poisoned = dataclasses.replace(prior, denoiser=PoisonedModule(prior.denoiser, level * INNER_STEPS + 1, 1))
    assert_only_row_1_diverged(run(settings(chain), prior=poisoned), run(settings(chain)))


@pytest.mark.parametrize("kernel", ["langevin", "hmc"])
@pytest.mark.parametrize("call", [0, 14, 29])
def test_nan_from_the_operator_stays_with_its_particle(kernel, call):
    prior, _ = problem()
    poisoned = LatentDAPS(prior, PoisonedOperator(MATRIX, call, 1), settings(KERNELS[kernel]))
    hurt = poisoned.sample(measurement(), ParticleStreams(42, 0), range(4))
    assert_only_row_1_diverged(hurt, run(settings(KERNELS[kernel])))


def test_metropolis_that_starts_on_a_nan_loss_is_marked():
    """The first evaluation of level 2 (7 calls a level): no proposal can be compared with it."""
    prior, _ = problem()
    poisoned = LatentDAPS(prior, PoisonedOperator(MATRIX, 14, 1), settings(KERNELS["mh"]))
    hurt = poisoned.sample(measurement(), ParticleStreams(42, 0), range(4))
    assert_only_row_1_diverged(hurt, run(settings(KERNELS["mh"])))


def test_metropolis_refuses_a_nan_proposal_and_goes_on():
    prior, _ = problem()
    poisoned = LatentDAPS(prior, PoisonedOperator(MATRIX, 16, 1), settings(KERNELS["mh"]))
    hurt, healthy = poisoned.sample(measurement(), ParticleStreams(42, 0), range(4)), run(settings(KERNELS["mh"]))
    assert not hurt.diverged.any() and hurt.z0_y.isfinite().all()
    assert torch.equal(hurt.z0_y[[0, 2, 3]], healthy.z0_y[[0, 2, 3]])


@pytest.mark.parametrize(("moment", "name"), [("before_ode", "z"), ("after_mcmc", "z0_y"), ("before_renoise", "z0_y")])
@pytest.mark.parametrize("step", [2, 4])
def test_nan_from_a_hook_stays_with_its_particle(moment, name, step):
    hurt = run(settings(), [PoisonedHook(moment, name, step, 1)])
    assert_only_row_1_diverged(hurt, run(settings()))


def test_diverged_particle_is_frozen_at_its_last_finite_level():
    recorder, plain = Recorder(), Recorder()
    run(settings(), [plain])
    run(settings(), [PoisonedHook("before_ode", "z", 2, 1), recorder])
    frozen, reference = recorder.seen["after_mcmc"], plain.seen["after_mcmc"][1]
    for state in frozen[2:]:
        assert state.diverged.tolist() == [False, True, False, False]
        for name in ("z0_hat", "z0_y", "loss"):
            assert torch.equal(getattr(state, name)[1], getattr(reference, name)[1])
