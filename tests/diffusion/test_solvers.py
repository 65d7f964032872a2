"""Solvers against diffusers' on the same network, their order on a Gaussian, and the exact map of consistency."""

import numpy as np
import pytest
import torch
from analytic import F64, normal
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from particledaps.diffusion.denoiser import EpsilonDenoiser
from particledaps.diffusion.noise import DiscreteNoise, alphas_cumprod
from particledaps.diffusion.pfode import DiffusionPFODE
from particledaps.diffusion.solvers import Solver
from particledaps.paths.schedules import edm_path

STD = 0.7
SHAPE = (2, 3, 4, 4)


def gaussian(z, sigma):
    """Prior ``N(0, STD^2)``."""
    return z * STD**2 / (STD**2 + torch.as_tensor(sigma, dtype=z.dtype) ** 2)


def exact_map(z, here, there):
    """Where the ODE takes z."""
    return z * ((STD**2 + there**2) / (STD**2 + here**2)) ** 0.5


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp2m", 2), ("unipc", 3)])
def test_measured_order(name, order):
    z, errors = 10 * normal(4, 1, 2, 2), []
    for steps in (40, 80, 160):
        path = edm_path(steps, 10.0, 0.05, end="sigma_min")
        errors.append((Solver(name).solve(gaussian, z, path) - exact_map(z, 10.0, 0.05)).abs().max().item())
    measured = np.log2(np.array(errors[:-1]) / errors[1:])
    assert measured == pytest.approx(order, abs=0.1)


def test_the_ode_of_the_sampler_takes_the_same_steps():
    z, path = 5 * normal(*SHAPE), edm_path(7, 5.0, 0.1)
    for name in ("euler", "heun"):
        assert torch.equal(Solver(name).solve(gaussian, z, path), DiffusionPFODE(gaussian, name).solve(z, path))
    torch.testing.assert_close(Solver("ddim").solve(gaussian, z, path), Solver("euler").solve(gaussian, z, path))


NETWORK_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class Network(torch.nn.Module):
    """An eps network that is no denoiser of anything simple."""

    def forward(self, x, t):
        t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1)
        return torch.tanh(1.3 * x + 0.2 * torch.sin(t / 150)) + 0.1 * x.roll(1, -1)


def ours_and_theirs(scheduler, steps):
    """Our path and denoiser for the timesteps that ``scheduler`` visits."""
    scheduler.set_timesteps(steps)
    betas = torch.linspace(NETWORK_BETAS["beta_start"] ** 0.5, NETWORK_BETAS["beta_end"] ** 0.5, 1000, dtype=F64) ** 2
    noise = DiscreteNoise(alphas_cumprod(betas))
    path = torch.cat([noise.sigmas[scheduler.timesteps], torch.zeros(1, dtype=F64)])
    return EpsilonDenoiser(Network(), noise), path


def scheduler_result(scheduler, x, **options):
    for t in scheduler.timesteps:
        x = scheduler.step(Network()(x, t), t, x, **options).prev_sample
    return x


def test_dpm_solver_is_that_of_diffusers():
    theirs = DPMSolverMultistepScheduler(**NETWORK_BETAS, algorithm_type="dpmsolver++", final_sigmas_type="zero")
    denoiser, path = ours_and_theirs(theirs, 12)
    x = normal(*SHAPE)
    found = Solver("dpmpp2m").solve(denoiser, x * (1 + path[0] ** 2) ** 0.5, path)
    torch.testing.assert_close(found, scheduler_result(theirs, x).to(F64), rtol=1e-4, atol=1e-4)


def test_unipc_is_that_of_diffusers():
    theirs = UniPCMultistepScheduler(**NETWORK_BETAS, solver_order=2, solver_type="bh2", final_sigmas_type="zero")
    denoiser, path = ours_and_theirs(theirs, 12)
    x = normal(*SHAPE)
    found = Solver("unipc").solve(denoiser, x * (1 + path[0] ** 2) ** 0.5, path)
    torch.testing.assert_close(found, scheduler_result(theirs, x).to(F64), rtol=1e-4, atol=1e-4)


def test_ddim_without_noise_is_that_of_diffusers():
    theirs = DDIMScheduler(**NETWORK_BETAS, clip_sample=False, set_alpha_to_one=True)
    denoiser, path = ours_and_theirs(theirs, 10)
    x = normal(*SHAPE)
    found = Solver("ddim").solve(denoiser, x * (1 + path[0] ** 2) ** 0.5, path)
    torch.testing.assert_close(found, scheduler_result(theirs, x, eta=0.0).to(F64), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_ddim_with_noise_is_that_of_diffusers_in_law(eta):
    """One step from the same z: mean and spread of the noise that is added."""
    theirs = DDIMScheduler(**NETWORK_BETAS, clip_sample=False, set_alpha_to_one=True)
    denoiser, path = ours_and_theirs(theirs, 10)
    x, t = normal(1, 1, 2, 2).expand(20_000, -1, -1, -1), theirs.timesteps[3]
    step, scale = path[3:5], (1 + path[4] ** 2) ** 0.5
    found = Solver("ddim", eta).solve(denoiser, x * (1 + path[3] ** 2) ** 0.5, step, lambda: normal(*x.shape, seed=2))
    generator = torch.Generator().manual_seed(1)
    drawn = theirs.step(Network()(x, t), t, x, eta=eta, generator=generator).prev_sample.to(F64) * scale
    torch.testing.assert_close(found.mean(0), drawn.mean(0), rtol=0, atol=0.05)
    torch.testing.assert_close(found.std(0), drawn.std(0), rtol=0.03, atol=0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_keeps_the_distribution_of_a_gaussian(eta):
    """Many small steps, with whatever noise: the standard deviation that the prior has."""
    z, generator = 10 * normal(20_000, 1, 1, 1), torch.Generator().manual_seed(3)
    z = z * (1 + STD**2 / 100) ** 0.5
    path = edm_path(200, 10.0, 0.02)
    found = Solver("ddim", eta).solve(gaussian, z, path, lambda: torch.randn(z.shape, generator=generator, dtype=F64))
    assert found.std().item() == pytest.approx(STD, rel=0.03)


def test_consistency_with_the_exact_map_samples_the_gaussian():
    """The map of the whole ODE as denoiser: one step is exact, and so are several with fresh noise between."""

    def consistent(z, sigma):
        return exact_map(z, torch.as_tensor(sigma, dtype=z.dtype), 0.0)

    z, generator = 10 * normal(40_000, 1, 1, 1, seed=6), torch.Generator().manual_seed(7)
    z = z * (1 + STD**2 / 100) ** 0.5

    def draw():
        return torch.randn(z.shape, generator=generator, dtype=F64)

    one = Solver("consistency").solve(consistent, z, torch.tensor([10.0, 0.0]), draw)
    assert torch.equal(one, exact_map(z, 10.0, 0.0))
    four = Solver("consistency").solve(consistent, z, torch.tensor([10.0, 4.0, 1.0, 0.3, 0.0], dtype=F64), draw)
    assert four.std().item() == pytest.approx(STD, rel=0.02)


def test_calls():
    path = edm_path(6, 5.0, 0.1)
    for name, calls in (("euler", 6), ("ddim", 6), ("heun", 11), ("dpmpp2m", 6), ("consistency", 6)):
        counted = []

        def denoiser(z, sigma, counted=counted):
            counted.append(sigma)
            return gaussian(z, sigma)

        Solver(name).solve(denoiser, normal(*SHAPE), path, lambda: normal(*SHAPE))
        assert len(counted) == Solver(name).calls(path) == calls
    assert Solver("heun").calls(edm_path(6, 5.0, 0.1, end="sigma_min")) == 12


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (("leapfrog",), "solver='leapfrog': allowed are euler, ddim"),
        (("ddim", 1.5), "eta=1.5: must be from 0 to 1"),
        (("heun", 0.5), "only solver=ddim takes it"),
    ],
)
def test_bad_solvers(arguments, fragment):
    with pytest.raises(ValueError, match=fragment):
        Solver(*arguments)


def test_a_solver_that_draws_needs_noise():
    with pytest.raises(ValueError, match="give draw"):
        Solver("ddim", 1.0).solve(gaussian, normal(*SHAPE), edm_path(3, 5.0, 0.1))
