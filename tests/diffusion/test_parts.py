"""Noise levels a part: shapes, the joint ODE against its closed form, networks that know several levels."""

import numpy as np
import pytest
import torch
from analytic import F64, correlated, normal

from particledaps.diffusion.analytic import GaussianDenoiser
from particledaps.diffusion.denoiser import EDMDenoiser
from particledaps.diffusion.levels import broadcast_sigma, first_level, network_sigma
from particledaps.diffusion.pfode import DiffusionPFODE
from particledaps.diffusion.score import score
from particledaps.diffusion.solvers import Solver
from particledaps.paths.schedules import edm_path

PARTS = (3, 1)
SHAPE = (4, 2, 2)


def test_each_part_gets_its_level():
    z, sigma = torch.zeros(2, *SHAPE), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert broadcast_sigma(sigma, z, PARTS)[:, :, 0, 0].tolist() == [[1, 1, 1, 2], [3, 3, 3, 4]]
    assert broadcast_sigma(sigma, z)[:, :, 0, 0].tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert broadcast_sigma(sigma[:1], z, PARTS).shape == (1, 4, 1, 1)
    assert first_level(sigma, z).tolist() == [1, 3] and first_level(2.0, z).tolist() == [2]


@pytest.mark.parametrize("parts", [(3, 2), (2, 1, 1), (4,)])
def test_parts_that_do_not_fit(parts):
    with pytest.raises(ValueError, match=r"does not fit z of shape \(2, 4, 2, 2\)"):
        broadcast_sigma(torch.ones(2, 2), torch.zeros(2, *SHAPE), parts)


def test_a_network_is_told_the_levels_that_it_knows():
    z = torch.zeros(3, *SHAPE)
    assert network_sigma(2.0, z).tolist() == [2, 2, 2]
    assert network_sigma(torch.tensor([[2.0]]), z).tolist() == [2, 2, 2]
    assert network_sigma(2.0, z, 2).tolist() == [[2, 2]] * 3
    assert network_sigma(torch.tensor([1.0, 2.0, 3.0]), z, 2).tolist() == [[1, 1], [2, 2], [3, 3]]
    assert network_sigma(torch.tensor([[1.0, 2.0]]), z, 2).tolist() == [[1, 2]] * 3
    for sigma, levels, fragment in ((torch.ones(3, 2), 1, "one noise level"), (torch.ones(3, 3), 2, "not 3")):
        with pytest.raises(ValueError, match=fragment):
            network_sigma(sigma, z, levels)


def joint_gaussian():
    covariance = correlated(np.geomspace(0.05, 3.0, 16), seed=1)
    return GaussianDenoiser(torch.zeros(SHAPE, dtype=F64), covariance, PARTS), covariance


PATHS = {
    "together": torch.stack([edm_path(400, 8.0, 0.3, end="sigma_min")] * 2, dim=1),
    "one leads": torch.stack([edm_path(400, 8.0, 0.3, end="sigma_min"), edm_path(400, 3.0, 0.1, end="sigma_min")], 1),
    "one after the other": torch.cat(
        [
            torch.stack([torch.full((401,), 8.0, dtype=F64), edm_path(400, 8.0, 0.3, end="sigma_min")], 1),
            torch.stack([edm_path(400, 8.0, 0.3, end="sigma_min"), torch.full((401,), 0.3, dtype=F64)], 1)[1:],
        ]
    ),
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("solve", ["pfode", "heun", "dpmpp2m"])
def test_the_joint_ode_carries_the_noisy_gaussian_to_the_cleaner_one(path, solve):
    denoiser, covariance = joint_gaussian()
    noise = [torch.diag(row.square().repeat_interleave(torch.tensor(PARTS) * 4)) for row in (path[0], path[-1])]
    columns = torch.linalg.cholesky(covariance + noise[0]).T.reshape(16, *SHAPE)
    if solve == "pfode":
        carried = DiffusionPFODE(denoiser, "heun", PARTS).solve(columns, path)
    else:
        carried = Solver(solve).solve(denoiser, columns, path, parts=PARTS)
    rows = carried.flatten(1)
    torch.testing.assert_close(rows.T @ rows, covariance + noise[1], rtol=2e-3, atol=2e-3)


def test_the_score_of_each_part_is_that_of_the_joint_density():
    denoiser, covariance = joint_gaussian()
    z, sigma = normal(2, *SHAPE, seed=3), torch.tensor([[0.7, 2.5]], dtype=F64)
    total = covariance + torch.diag(sigma[0].square().repeat_interleave(torch.tensor(PARTS) * 4))
    expected = -torch.linalg.solve(total, z.flatten(1).T).T
    torch.testing.assert_close(score(denoiser, z, sigma, PARTS).flatten(1), expected)


@pytest.mark.parametrize("name", ["euler", "ddim", "heun", "dpmpp2m", "consistency"])
def test_a_part_whose_level_does_not_change_stays_as_it_is(name):
    denoiser, _ = joint_gaussian()
    z, levels = normal(2, *SHAPE, seed=4), edm_path(5, 4.0, 0.2)
    for held in (0.5, 0.0):
        path = torch.stack([levels, torch.full_like(levels, held)], dim=1)
        moved = Solver(name).solve(denoiser, z, path, lambda: normal(2, *SHAPE, seed=5), PARTS)
        assert torch.equal(moved[:, 3:], z[:, 3:])
        assert moved.isfinite().all() and not torch.allclose(moved[:, :3], z[:, :3])


class Told(torch.nn.Module):
    """Keeps what it was called with."""

    def forward(self, z, t):
        self.z, self.t = z, t
        return torch.zeros_like(z)


def test_the_edm_wrapper_has_a_scale_and_a_level_a_part():
    told = Told()
    denoiser = EDMDenoiser(told, [0.5, 2.0], 0.25, PARTS, sigma_min=0.01)
    z = torch.ones(2, *SHAPE)
    output = denoiser(z, torch.tensor([[1.0, 3.0]]))
    torch.testing.assert_close(told.t, torch.tensor([[1.0, 3.0]]).expand(2, 2).log() / 4)
    for channel, (sigma, scale) in enumerate([(1.0, 0.5)] * 3 + [(3.0, 2.0)]):
        total = sigma**2 + scale**2
        assert told.z[0, channel, 0, 0].item() == pytest.approx(total**-0.5)
        assert output[0, channel, 0, 0].item() == pytest.approx(scale**2 / total)
    held = denoiser(z, torch.tensor([[1.0, 0.0]]))
    assert torch.equal(held[:, 3:], z[:, 3:])
    assert told.t[0, 1].item() == pytest.approx(np.log(0.01) / 4)  # no smaller level than it was trained on


def test_equal_levels_are_the_plain_wrapper():
    torch.manual_seed(0)
    network = torch.nn.Conv2d(4, 4, 1)
    plain, parts = (
        EDMDenoiser(lambda z, t: network(z), 0.7),
        EDMDenoiser(lambda z, t: network(z), [0.7, 0.7], parts=PARTS),
    )
    z = torch.randn(3, *SHAPE)
    for sigma in (1.3, torch.tensor([0.2, 1.0, 5.0])):
        torch.testing.assert_close(parts(z, sigma), plain(z, sigma))
