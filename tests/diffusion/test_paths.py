import math

import numpy as np
import pytest
import torch

from particledaps.diffusion.solvers import Solver
from particledaps.paths.schedules import (
    AYS_SIGMAS,
    PATHS,
    ays_path,
    cosine_path,
    edm_path,
    scaled_vp_path,
    tan_path,
    trailing_timesteps,
    ve_path,
    vp_path,
)

LATENT_DAPS_LEVELS = """
10.000 9.344 8.726 8.143 7.594 7.076 6.590 6.132 5.702 5.297 4.918 4.562 4.229 3.917 3.624 3.351 3.095 2.856 2.634 2.426
2.233 2.052 1.885 1.729 1.585 1.451 1.327 1.212 1.105 1.007 0.9164 0.8329 0.7559 0.6852 0.6202 0.5605 0.5059 0.4558
0.4101 0.3684 0.3303 0.2957 0.2642 0.2357 0.2098 0.1864 0.1653 0.1463 0.1292 0.1138 0
"""


def values(path):
    return path.numpy()


@pytest.mark.parametrize("build", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("num_steps", [1, 2, 17])
def test_path_runs_down_from_sigma_max_to_its_end(build, end, num_steps):
    path = build(num_steps, 10.0, 0.1, end=end)
    assert path.dtype == torch.float64 and path.shape == (num_steps + 1,)
    assert path[0] == 10.0 and path[-1] == (0.0 if end == "zero" else 0.1)
    assert (path.diff() < 0).all()


@pytest.mark.parametrize("build", PATHS.values(), ids=PATHS)
def test_end_changes_the_last_node_only(build):
    zero, kept = build(9, 5.0, 0.2, end="zero"), build(9, 5.0, 0.2, end="sigma_min")
    assert torch.equal(zero[:-1], kept[:-1])


@pytest.mark.parametrize("build", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(
    "arguments",
    [
        (0, 10.0, 0.1),
        (5, 0.1, 10.0),
        (5, 1.0, 1.0),
        (5, 10.0, 0.0),
        (5, 10.0, -1.0),
        (5, math.inf, 0.1),
        (5, 10.0, math.nan),
    ],
)
def test_impossible_paths_are_refused(build, arguments):
    with pytest.raises(ValueError, match="num_steps >= 1 and 0 < sigma_min < sigma_max"):
        build(*arguments)


@pytest.mark.parametrize("build", PATHS.values(), ids=PATHS)
def test_unknown_end_is_refused(build):
    with pytest.raises(ValueError, match="zero, sigma_min"):
        build(5, 10.0, 0.1, end="nowhere")


def test_edm_annealing_levels_of_latent_daps():
    expected = np.array(LATENT_DAPS_LEVELS.split(), dtype=float)
    np.testing.assert_allclose(values(edm_path(50, 10.0, 0.1)), expected, rtol=0, atol=6e-4)
    np.testing.assert_allclose(values(edm_path(50, 10.0, 0.1))[30:], expected[30:], rtol=0, atol=6e-5)


def test_edm_formula_by_hand():
    expected = [(10 ** (1 / 7) + i / 50 * (0.1 ** (1 / 7) - 10 ** (1 / 7))) ** 7 for i in range(50)]
    np.testing.assert_allclose(values(edm_path(50, 10.0, 0.1, rho=7))[:-1], expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("num_steps", "sigma", "sigma_min", "expected"),
    [
        (2, 10.0, 0.001, [10, 0.4124, 0.001]),
        (2, 1.0, 0.001, [1, 0.0718, 0.001]),
        (5, 100.0, 0.01, [100, 33.03, 8.856, 1.748, 0.2106, 0.01]),
    ],
)
def test_edm_inner_path_that_keeps_sigma_min(num_steps, sigma, sigma_min, expected):
    path = values(edm_path(num_steps, sigma, sigma_min, end="sigma_min"))
    np.testing.assert_allclose(path, expected, rtol=4e-4)


def test_edm_with_rho_one_is_linear():
    np.testing.assert_allclose(values(edm_path(4, 5.0, 1.0, rho=1, end="sigma_min")), [5, 4, 3, 2, 1])


def test_ve_path_is_geometric():
    path = values(ve_path(12, 100.0, 0.01, end="sigma_min"))
    np.testing.assert_allclose(path[1:] / path[:-1], 1e-4 ** (1 / 12), rtol=1e-12)


def test_cosine_path_is_uniform_in_the_angle():
    angles = np.arctan(values(cosine_path(12, 100.0, 0.01, end="sigma_min")))
    np.testing.assert_allclose(np.diff(angles), (math.atan(0.01) - math.atan(100.0)) / 12, rtol=1e-10)


def linear_time(sigma):
    """Root t of ``0.1 t + 19.9 t^2 / 2 = log(1 + sigma^2)``."""
    return (np.sqrt(0.1**2 + 2 * 19.9 * np.log1p(sigma**2)) - 0.1) / 19.9


def test_vp_path_is_uniform_in_time():
    path = values(vp_path(20, 80.0, 0.02, end="sigma_min"))
    times = linear_time(path)
    np.testing.assert_allclose(times, np.linspace(times[0], times[-1], 21), rtol=0, atol=1e-12)


def test_scaled_vp_path_is_uniform_in_time():
    root_start, root_end = math.sqrt(1.5), math.sqrt(19.5)
    slope = root_end - root_start
    path = values(scaled_vp_path(20, 80.0, 0.05, end="sigma_min"))
    times = (np.cbrt(3 * slope * np.log1p(path**2) + root_start**3) - root_start) / slope
    np.testing.assert_allclose(times, np.linspace(times[0], times[-1], 21), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("power", "low", "high"), [(1, 0.1, 20.0), (2, 1.5, 19.5)])
def test_vp_sigma_is_the_integral_of_beta(power, low, high):
    """The middle node against the trapezoidal rule on ``beta(t) = (a t + b)^n``."""
    path = values(vp_path(2, 5.0, 0.5, low, high, power, end="sigma_min"))
    grid = np.linspace(0, 1, 200_001)
    beta = (low ** (1 / power) + (high ** (1 / power) - low ** (1 / power)) * grid) ** power
    integral = np.concatenate([[0], np.cumsum((beta[1:] + beta[:-1]) / 2) * grid[1]])
    times = np.interp(np.log1p(path**2), integral, grid)
    assert times[1] == pytest.approx((times[0] + times[2]) / 2, abs=1e-8)


def euler_deviation(path, std):
    """What Euler's steps make of the deviation of a Gaussian, over the right one: the exact denoiser shrinks z."""
    z = path[0].reshape(1, 1, 1, 1).clone()

    def denoiser(z, sigma):
        return z * std**2 / (std**2 + sigma**2)

    end = Solver("euler").solve(denoiser, z, path)
    return (end / path[0]).item() * (path[0] ** 2 + std**2).sqrt().item() / std


def test_the_tan_path_shrinks_a_gaussian_by_the_cosines_of_its_angles():
    """0.8849 of the right deviation for ten steps from 80 to 0.002 at c = 0.5; rho 7 gives 0.753."""
    path = tan_path(10, 80.0, 0.002, 0.5, end="sigma_min")
    step = (math.atan(80 / 0.5) - math.atan(0.002 / 0.5)) / 10
    found, others = euler_deviation(path, 0.5), edm_path(10, 80.0, 0.002, end="sigma_min")
    assert found == pytest.approx(math.cos(step) ** 10, rel=2e-5) and found == pytest.approx(0.8849, abs=1e-4)
    assert euler_deviation(others, 0.5) == pytest.approx(0.753, abs=1e-3)
    torch.testing.assert_close(tan_path(7, 10.0, 0.1), cosine_path(7, 10.0, 0.1))


@pytest.mark.parametrize("table", AYS_SIGMAS)
def test_tables_are_met_at_ten_steps_and_scaled(table):
    sigmas = torch.tensor(AYS_SIGMAS[table], dtype=torch.float64)
    torch.testing.assert_close(ays_path(10, sigmas[0].item(), 0.01, table)[:-1], sigmas[:-1])
    twenty = ays_path(20, 2 * sigmas[0].item(), 0.01, table)
    torch.testing.assert_close(twenty[:-1:2], 2 * sigmas[:-1])
    torch.testing.assert_close(twenty[1].square(), twenty[0] * twenty[2])  # log-linear between


def test_trailing_timesteps_are_those_of_lin():
    assert trailing_timesteps(10, 1000).tolist() == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    with pytest.raises(ValueError, match="1001 trailing steps"):
        trailing_timesteps(1001, 1000)
