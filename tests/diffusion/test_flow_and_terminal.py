"""Networks of other trainings: rectified flow, and v-prediction with zero terminal SNR."""

import numpy as np
import pytest
import torch
from analytic import F64, normal
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from particledaps.diffusion.denoiser import FlowDenoiser, VDenoiser
from particledaps.diffusion.noise import (
    TERMINAL_SIGMA,
    DiscreteNoise,
    FlowNoise,
    alphas_cumprod,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_snr,
)
from particledaps.diffusion.solvers import Solver

MEAN, STD = 0.4, 0.6
BETAS = {"linear": linear_betas(), "scaled_linear": scaled_linear_betas(1000, 0.00085, 0.012)}


def gaussian(z, sigma):
    """Prior ``N(MEAN, STD^2)``."""
    return MEAN + STD**2 / (STD**2 + sigma**2) * (z - MEAN)


# --- Rectified flow --------------------------------------------------------------------------------------------------


def velocity(x, t):
    """Closed form ``E[eps - z0 | x]`` of the Gaussian, for x = (1 - t) z0 + t eps and t in [0, 1000]."""
    t = (t / 1000).reshape(-1, 1, 1, 1)
    variance = (1 - t) ** 2 * STD**2 + t**2
    offset = x - (1 - t) * MEAN
    return t * offset / variance - (MEAN + (1 - t) * STD**2 * offset / variance)


def test_the_flow_wrapper_is_the_closed_form_of_a_gaussian():
    denoiser, sigma = FlowDenoiser(velocity, FlowNoise()), torch.tensor([0.01, 0.3, 1.0, 8.0, 500.0], dtype=F64)
    z = normal(5, 2, 3, 3) * (1 + sigma.reshape(-1, 1, 1, 1))
    torch.testing.assert_close(denoiser(z, sigma), gaussian(z, sigma.reshape(-1, 1, 1, 1)))


def test_time_1_stands_at_the_terminal_sigma():
    noise, told = FlowNoise(), []
    assert noise.sigma_to_t(torch.tensor([0.0, 1.0, 3.0])).tolist() == [0, 500, 750]
    assert noise.sigma_to_t(TERMINAL_SIGMA).item() == 1000 and noise.sigma_to_t(1e6).item() == 1000
    sigma = torch.tensor([0.1, 2.0, 50.0], dtype=F64)
    torch.testing.assert_close(noise.t_to_sigma(noise.sigma_to_t(sigma)), sigma)
    assert noise.t_to_sigma(1000.0).item() == TERMINAL_SIGMA

    def network(x, t):
        told.append((x, t))
        return x

    z = TERMINAL_SIGMA * normal(2, 1, 2, 2)
    FlowDenoiser(network, noise)(z, TERMINAL_SIGMA)
    assert told[0][1].tolist() == [1000, 1000]
    torch.testing.assert_close(told[0][0], z / (1 + TERMINAL_SIGMA))


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_euler_steps_of_diffusers_flow_scheduler(shift):
    """In flow time Euler is another step than in sigma, so the paths meet where steps are small."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(400)
    x = normal(2, 1, 3, 3)
    sigmas = theirs.sigmas.to(F64)
    found = Solver("heun").solve(
        FlowDenoiser(velocity, FlowNoise()),
        x / (1 - sigmas[1]) * 1.0,
        torch.cat([(sigmas[1:-1] / (1 - sigmas[1:-1])), torch.zeros(1, dtype=F64)]),
    )
    drawn = x
    for t in theirs.timesteps[1:]:
        drawn = theirs.step(velocity(drawn, t.to(F64)), t, drawn).prev_sample.to(F64)
    torch.testing.assert_close(found, drawn, rtol=0.02, atol=0.02)


# --- Zero terminal SNR -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)
def test_the_rescaled_schedule_is_that_of_diffusers(betas):
    ours, theirs = zero_terminal_snr(betas), alphas_cumprod(rescale_zero_terminal_snr(betas.clone()))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert ours[-1] == 0 and ours[0].item() == pytest.approx(alphas_cumprod(betas)[0].item(), abs=1e-15)


def test_the_last_timestep_stands_at_the_terminal_sigma():
    noise = DiscreteNoise(zero_terminal_snr(BETAS["scaled_linear"]))
    assert noise.sigma_max == TERMINAL_SIGMA
    assert noise.sigma_to_t(torch.tensor([TERMINAL_SIGMA, 1e5])).tolist() == [999, 999]
    t = torch.tensor([0.0, 3.5, 700.0, 995.5, 996.0, 997.0, 998.0, 998.5, 998.9, 999.0], dtype=F64)
    torch.testing.assert_close(noise.sigma_to_t(noise.t_to_sigma(t)), t, rtol=0, atol=1e-6)
    assert (noise.t_to_sigma(t).diff() > 0).all()
    last = int((noise.sigmas < TERMINAL_SIGMA).nonzero()[-1])  # others follow, which stand above it
    middle = noise.t_to_sigma(torch.tensor((last + 999) / 2, dtype=F64)).item()
    signals = [1 / (1 + s**2) ** 0.5 for s in (noise.sigmas[last].item(), middle, TERMINAL_SIGMA)]
    assert last < 998 and signals[1] == pytest.approx((signals[0] + signals[2]) / 2)  # not the sigmas' geometric mean


def test_inside_the_grid_nothing_changes():
    plain = DiscreteNoise(alphas_cumprod(BETAS["linear"]))
    assert not plain.terminal and plain.sigma_max < TERMINAL_SIGMA
    values = zero_terminal_snr(BETAS["linear"])
    terminal, cut = DiscreteNoise(values), DiscreteNoise(values[:-1])
    sigma = torch.tensor([0.02, 1.0, 30.0], dtype=F64)
    torch.testing.assert_close(terminal.sigma_to_t(sigma), cut.sigma_to_t(sigma))


@pytest.mark.parametrize(
    "values",
    [
        [0.9, 0.0, 0.0],
        [0.9, 0.5, -0.1],
    ],
    ids=["two zeros", "negative"],
)
def test_schedules_that_are_none(values):
    with pytest.raises(ValueError, match="decreasing sequence"):
        DiscreteNoise(torch.tensor(values, dtype=F64))


def without_terminal_signal(**more):
    """Diffusers' DDIM of a network that predicts v."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        **more,
    )


def test_v_prediction_is_that_of_diffusers_up_to_the_last_timestep():
    """One network, one schedule: the estimates of the clean image that both read off it."""

    def network(x, t):
        return torch.tanh(x + 0.1 * torch.sin(torch.as_tensor(t, dtype=x.dtype) / 100).reshape(-1, 1, 1, 1))

    theirs = without_terminal_signal()
    theirs.set_timesteps(8)
    noise = DiscreteNoise(zero_terminal_snr(BETAS["scaled_linear"]))
    denoiser, x = VDenoiser(network, noise), normal(2, 1, 4, 4)
    assert theirs.timesteps[0] == 999
    for t in theirs.timesteps:
        expected = theirs.step(network(x, t), t, x).pred_original_sample.to(F64)
        sigma = noise.sigmas[t]
        found = denoiser(x * (1 + sigma**2).sqrt(), sigma)
        torch.testing.assert_close(found, expected, rtol=0, atol=5e-3 if t == 999 else 2e-4)


def test_ddim_steps_from_pure_noise_are_those_of_diffusers():
    def network(x, t):
        return 0.5 * torch.tanh(x)

    theirs = without_terminal_signal(set_alpha_to_one=True)
    theirs.set_timesteps(10)
    noise, drawn = DiscreteNoise(zero_terminal_snr(BETAS["scaled_linear"])), normal(2, 1, 4, 4)
    path = torch.cat([noise.sigmas[theirs.timesteps], torch.zeros(1, dtype=F64)])
    found = Solver("ddim").solve(VDenoiser(network, noise), drawn * (1 + path[0] ** 2) ** 0.5, path)
    for t in theirs.timesteps:
        drawn = theirs.step(network(drawn, t), t, drawn, eta=0.0).prev_sample
    torch.testing.assert_close(found, drawn.to(F64), rtol=0, atol=5e-3)
    assert np.isfinite(found.numpy()).all()
