import numpy as np
import pytest
import torch
from analytic import F64, normal

from particledaps.diffusion.analytic import GaussianDenoiser
from particledaps.diffusion.pfode import DiffusionPFODE
from particledaps.paths.schedules import edm_path, ve_path

SHAPE = (2, 3, 1)
MEAN, VARIANCE = normal(*SHAPE, seed=1), 0.49
SOLVERS = ("euler", "heun")


def ode(solver="euler"):
    return DiffusionPFODE(GaussianDenoiser(MEAN, VARIANCE), solver)


def noisy(sigma, count=3):
    return MEAN + sigma * normal(count, *SHAPE, seed=2)


def closed_form(z, start, end):
    """``z(sigma) - mu`` is proportional to the standard deviation of the noisy prior."""
    return MEAN + (z - MEAN) * ((VARIANCE + end**2) / (VARIANCE + start**2)) ** 0.5


def measured_order(solver, start, end, path_end, steps):
    z = noisy(start)
    exact = closed_form(z, start, 0.0 if path_end == "zero" else end)
    errors = [(ode(solver).solve(z, edm_path(n, start, end, end=path_end)) - exact).norm().item() for n in steps]
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize(("solver", "low", "high"), [("euler", 0.9, 1.1), ("heun", 1.8, 2.3)])
def test_convergence_order(solver, low, high):
    assert low <= measured_order(solver, 5.0, 0.05, "sigma_min", [40, 80, 160, 320]) <= high


@pytest.mark.parametrize("solver", SOLVERS)
def test_path_to_zero_reaches_the_clean_closed_form(solver):
    z = noisy(5.0)
    clean = ode(solver).solve(z, edm_path(2000, 5.0, 1e-3))
    torch.testing.assert_close(clean, closed_form(z, 5.0, 0.0), rtol=5e-3, atol=5e-3)


def test_one_euler_step_to_zero_is_the_denoiser():
    z = noisy(2.0)
    one = ode().solve(z, torch.tensor([2.0, 0.0], dtype=F64))
    torch.testing.assert_close(one, GaussianDenoiser(MEAN, VARIANCE)(z, 2.0), rtol=1e-12, atol=1e-12)


def test_one_heun_step_by_hand():
    z, high, low = noisy(2.0), 2.0, 0.5

    def slope(position, sigma):
        return sigma * (position - MEAN) / (VARIANCE + sigma**2)

    euler = z + (low - high) * slope(z, high)
    expected = z + (low - high) * (slope(z, high) + slope(euler, low)) / 2
    path = torch.tensor([high, low], dtype=F64)
    torch.testing.assert_close(ode("heun").solve(z, path), expected, rtol=1e-12, atol=1e-12)


def test_derivative_is_minus_sigma_times_score():
    z = noisy(1.5)
    expected = 1.5 * (z - MEAN) / (VARIANCE + 1.5**2)
    torch.testing.assert_close(ode().derivative(z, 1.5), expected, rtol=1e-12, atol=1e-12)


SCALES = {
    "number": 0.3,
    "tensor": torch.tensor(0.3, dtype=F64),
    "per_particle": torch.tensor([0.0, 0.3, -1.0], dtype=F64),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_repulsion_adds_scale_times_term_to_the_score_once(scale):
    z, term, repelled = noisy(1.5), normal(3, *SHAPE, seed=4), ode()
    plain = repelled.derivative(z, 1.5)
    repelled.set_repulsion(term, scale)
    repelled.set_repulsion(term, scale)
    change = repelled.derivative(z, 1.5) - plain
    expected = -1.5 * torch.as_tensor(scale, dtype=F64).expand(3).reshape(3, 1, 1, 1) * term
    torch.testing.assert_close(change, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_repulsion_is_a_shift_of_the_denoiser(solver, scale):
    """A score with ``s r`` more belongs to the denoiser ``D + s sigma^2 r``."""
    term, plain = normal(3, *SHAPE, seed=4), GaussianDenoiser(MEAN, VARIANCE)
    factor = torch.as_tensor(scale, dtype=F64).expand(3).reshape(3, 1, 1, 1)

    def shifted(z, sigma):
        return plain(z, sigma) + factor * sigma.square() * term

    repelled = DiffusionPFODE(plain, solver)
    repelled.set_repulsion(term, scale)
    z, path = noisy(4.0), edm_path(6, 4.0, 0.1)
    expected = DiffusionPFODE(shifted, solver).solve(z, path)
    torch.testing.assert_close(repelled.solve(z, path), expected, rtol=1e-12, atol=1e-12)


def test_repulsion_of_one_particle_leaves_the_others_alone():
    term, repelled, z, path = normal(3, *SHAPE, seed=4), ode(), noisy(4.0), edm_path(6, 4.0, 0.1)
    repelled.set_repulsion(term, torch.tensor([0.0, 0.5, 0.0], dtype=F64))
    moved = (repelled.solve(z, path) != ode().solve(z, path)).flatten(1).any(1)
    assert moved.tolist() == [False, True, False]


@pytest.mark.parametrize("solver", SOLVERS)
def test_cleared_repulsion_leaves_no_trace(solver):
    z, path, used = noisy(4.0), edm_path(6, 4.0, 0.1), ode(solver)
    before = used.solve(z, path)
    used.set_repulsion(normal(3, *SHAPE, seed=4), 0.7)
    assert not torch.equal(used.solve(z, path), before)
    used.clear_repulsion()
    assert torch.equal(used.solve(z, path), before)


@pytest.mark.parametrize(
    ("solver", "end", "calls"), [("euler", "zero", 7), ("heun", "zero", 13), ("heun", "sigma_min", 14)]
)
def test_denoiser_is_never_asked_about_sigma_zero(solver, end, calls):
    plain, seen = GaussianDenoiser(MEAN, VARIANCE), []

    def spy(z, sigma):
        seen.append(float(sigma.min()))
        return plain(z, sigma)

    assert DiffusionPFODE(spy, solver).solve(noisy(4.0), edm_path(7, 4.0, 0.1, end=end)).isfinite().all()
    assert min(seen) > 0 and len(seen) == calls


def solve_group(group, z, path, solver):
    """The ODE of the channels of one group on their own."""
    denoiser = GaussianDenoiser(MEAN[group : group + 1], VARIANCE)
    return DiffusionPFODE(denoiser, solver).solve(z[:, group : group + 1], path)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
def test_two_groups_are_two_odes(solver, end):
    first, second = edm_path(6, 4.0, 0.1, end=end), ve_path(6, 0.9, 0.02, end=end)
    z = noisy(2.0)
    together = ode(solver).solve(z, torch.stack([first, second], dim=1))
    alone = torch.cat([solve_group(0, z, first, solver), solve_group(1, z, second, solver)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_particles_at_different_levels_are_solved_on_their_own(solver):
    paths = [edm_path(6, start, 0.1) for start in (4.0, 2.0, 0.5)]
    z = noisy(2.0)
    together = ode(solver).solve(z, torch.stack(paths, dim=1)[..., None])
    alone = torch.cat([ode(solver).solve(row[None], path) for row, path in zip(z, paths, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_group_that_is_clean_before_the_other_stays_where_it_is(solver):
    first = torch.tensor([4.0, 1.0, 0.3, 0.0], dtype=F64)
    second = torch.tensor([1.0, 0.2, 0.0, 0.0], dtype=F64)
    z = noisy(2.0)
    together = ode(solver).solve(z, torch.stack([first, second], dim=1))
    alone = torch.cat([solve_group(0, z, first, solver), solve_group(1, z, second[:3], solver)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="euler, heun"):
        DiffusionPFODE(GaussianDenoiser(MEAN, VARIANCE), "rk45")
