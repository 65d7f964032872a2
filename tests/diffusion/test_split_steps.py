import math

import pytest
import torch
from analytic import F64, normal

from particledaps.diffusion.mcmc import ChainSettings, Evaluation, hmc_step, langevin_step, run_chain
from particledaps.diffusion.split_steps import crank_nicolson_step, rotation_step

VARIANCE = torch.tensor([1e-4, 0.3, 25.0], dtype=F64)
CURVATURE = torch.tensor([0.0, 2.0, 0.7], dtype=F64)
MOMENTUM = 0.6


def stationary(kernel, curvature, step_size, variance=VARIANCE):
    """Variance of the position that a kernel keeps in each direction, from its own linear map."""
    found = []
    for kappa, own in zip(curvature.tolist(), variance.tolist(), strict=True):
        v = torch.tensor([[own]], dtype=F64)

        def step(a, velocity, noise, kappa=kappa, v=v):
            a, velocity, noise = (torch.tensor([[float(n)]], dtype=F64) for n in (a, velocity, noise))
            if kernel == "langevin":
                return torch.stack([crank_nicolson_step(a, kappa * a, v, step_size, noise), velocity * 0]).flatten()
            return torch.stack(rotation_step(a, velocity, kappa * a, v, step_size, MOMENTUM, noise)).flatten()

        matrix = torch.stack([step(*column) for column in torch.eye(3).tolist()], dim=1)
        moved, added = matrix[:, :2], matrix[:, 2:]
        system = torch.eye(4, dtype=F64) - torch.kron(moved, moved)
        found.append(torch.linalg.solve(system, (added @ added.T).flatten())[0].item())
    return torch.tensor(found, dtype=F64)


@pytest.mark.parametrize("kernel", ["langevin", "hmc"])
@pytest.mark.parametrize("step_size", [1e-4, 0.05, 3.0])
def test_the_gaussian_part_alone_is_kept_exactly_at_any_step(kernel, step_size):
    torch.testing.assert_close(stationary(kernel, 0 * CURVATURE, step_size), VARIANCE, rtol=1e-9, atol=0)


def test_crank_nicolson_errs_by_the_curvature_of_the_data_alone():
    expected = 1 / ((CURVATURE + 1 / VARIANCE) * (1 - 0.3 * CURVATURE / 2))
    torch.testing.assert_close(stationary("langevin", CURVATURE, 0.3), expected, rtol=1e-9, atol=0)


def test_the_rotation_comes_to_the_target_with_the_square_of_its_step():
    exact = 1 / (CURVATURE + 1 / VARIANCE)
    coarse, fine = ((stationary("hmc", CURVATURE, eta) - exact).abs()[1:] for eta in (4e-3, 1e-3))
    assert (fine / exact[1:]).max() < 1e-3
    torch.testing.assert_close(coarse / fine, torch.full_like(fine, 4.0), rtol=0.05, atol=0)  # eta is h squared


def test_without_a_gaussian_part_they_are_the_plain_kernels():
    a, velocity, gradient, noise = (normal(4, 3, seed=i) for i in range(4))
    endless = torch.full((3,), 1e20, dtype=F64)
    torch.testing.assert_close(
        crank_nicolson_step(a, gradient, endless, 0.02, noise), langevin_step(a, gradient, 0.02, noise)
    )
    scale = math.sqrt((1 + MOMENTUM) / 2)  # velocities of unit variance here, of 2 / (1 + m) there
    moved, turned = rotation_step(a, scale * velocity, gradient, endless, 0.02, MOMENTUM, noise)
    expected, faster = hmc_step(a, velocity, gradient, 0.02, MOMENTUM, noise)
    torch.testing.assert_close(moved, expected)
    torch.testing.assert_close(turned, scale * faster)


CHAINS = {
    "langevin": ChainSettings("langevin", 300, 0.05),
    "hmc": ChainSettings("hmc", 200, 0.03, momentum=MOMENTUM),
    "limited": ChainSettings("langevin", 400, 5.0, curvature_limit=0.1),
    "mh": ChainSettings("mh", 3000, 0.05),
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_chains_sample_the_product(chain):
    variance, shift = torch.tensor([0.1, 0.3, 2.0], dtype=F64), torch.tensor([1.0, -0.5, 0.8], dtype=F64)
    generator = torch.Generator().manual_seed(1)
    count = 6000

    def data(a, with_gradient):
        offset = a - shift
        loss = (CURVATURE * offset.square()).sum(1)
        return Evaluation(loss / 2, CURVATURE * offset if with_gradient else None, loss)

    a, loss = run_chain(
        torch.zeros(count, 3, dtype=F64),
        data,
        chain,
        lambda: torch.randn(count, 3, generator=generator, dtype=F64),
        lambda: torch.rand(count, generator=generator, dtype=F64),
        variance,
    )
    precision = CURVATURE + 1 / variance
    spread = precision**-0.5
    torch.testing.assert_close(a.mean(0) / spread, CURVATURE * shift / precision / spread, rtol=0, atol=0.06)
    torch.testing.assert_close(a.var(0) * precision, torch.ones(3, dtype=F64), rtol=0, atol=0.12)
    assert loss.shape == (count,) and loss.isfinite().all()
