import numpy as np
import pytest
import torch

from particledaps.diffusion.noise import (
    ContinuousScaledVPNoise,
    ContinuousVPNoise,
    DiscreteNoise,
    alphas_cumprod,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
)

BETAS = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "cosine": cosine_betas}


def discrete(name):
    return DiscreteNoise(alphas_cumprod(BETAS[name]()))


LATENT = discrete("scaled_linear")


@pytest.mark.parametrize("name", BETAS)
def test_sigma_to_t_to_sigma(name):
    noise = discrete(name)
    sigma = torch.logspace(np.log10(noise.sigma_min), np.log10(noise.sigma_max), 997, dtype=torch.float64)
    torch.testing.assert_close(noise.t_to_sigma(noise.sigma_to_t(sigma)), sigma, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", BETAS)
def test_t_to_sigma_to_t(name):
    t = torch.linspace(0, 999, 1733, dtype=torch.float64)
    torch.testing.assert_close(discrete(name).sigma_to_t(discrete(name).t_to_sigma(t)), t, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", BETAS)
def test_integer_timesteps_are_the_checkpoints_own_levels(name):
    noise, betas = discrete(name), BETAS[name]().numpy()
    expected = np.sqrt(1 / np.cumprod(1 - betas) - 1)
    np.testing.assert_allclose(noise.t_to_sigma(torch.arange(1000.0, dtype=torch.float64)), expected, rtol=1e-9)
    np.testing.assert_allclose(noise.sigma_to_t(torch.from_numpy(expected)), np.arange(1000), atol=1e-6)


def test_log_sigma_is_linear_between_timesteps():
    low, high = LATENT.sigmas[500], LATENT.sigmas[501]
    between = low**0.75 * high**0.25
    assert LATENT.sigma_to_t(between).item() == pytest.approx(500.25, abs=1e-9)


@pytest.mark.parametrize("name", BETAS)
def test_outside_the_grid_the_nearest_timestep_is_used(name):
    noise = discrete(name)
    sigma = torch.tensor([0.0, 1e-6, noise.sigma_min * 0.99, noise.sigma_max * 1.01, 1e9], dtype=torch.float64)
    assert noise.sigma_to_t(sigma).tolist() == [0, 0, 0, 999, 999]
    assert noise.t_to_sigma(torch.tensor([-3.0, 2000.0], dtype=torch.float64)).tolist() == pytest.approx(
        [noise.sigma_min, noise.sigma_max], rel=1e-12
    )


def test_latent_diffusion_grid():
    assert alphas_cumprod(scaled_linear_betas())[-1].item() == pytest.approx(1.423e-4, rel=5e-4)
    assert LATENT.sigma_min == pytest.approx(0.0388, abs=5e-5)
    assert LATENT.sigma_max == pytest.approx(83.82, abs=5e-3)


def test_ddpm_grid():
    assert discrete("linear").sigma_min == pytest.approx(0.01, abs=1e-4)
    assert discrete("linear").sigma_max == pytest.approx(157.4, abs=0.05)


@pytest.mark.parametrize(("sigma", "own", "official"), [(10, 736.8, 675.4), (1, 254.0, 258.7), (0.1072, 6.5, 29.2)])
def test_latent_timestep_and_the_one_that_daps_feeds(sigma, own, official):
    sigma = torch.tensor(float(sigma), dtype=torch.float64)
    assert LATENT.sigma_to_t(sigma).item() == pytest.approx(own, abs=0.1)
    assert ContinuousVPNoise().sigma_to_t(sigma).item() == pytest.approx(official, abs=0.1)


def test_continuous_map_is_right_for_ddpm_checkpoints_and_wrong_for_latent_ones():
    sigma, official = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64), ContinuousVPNoise()
    assert (official.sigma_to_t(sigma) - discrete("linear").sigma_to_t(sigma)).abs().max() < 2
    assert (official.sigma_to_t(sigma) - LATENT.sigma_to_t(sigma)).abs().max() > 60


def test_continuous_map_round_trip():
    sigma, noise = torch.logspace(-2, 2, 101, dtype=torch.float64), ContinuousVPNoise()
    torch.testing.assert_close(noise.t_to_sigma(noise.sigma_to_t(sigma)), sigma, rtol=1e-6, atol=0)


@pytest.mark.parametrize("noise", [LATENT, ContinuousVPNoise()], ids=["discrete", "continuous"])
def test_maps_keep_shape_and_dtype(noise):
    for sigma in (torch.ones(2, 3), torch.ones((), dtype=torch.float64), torch.ones(4)[::2]):
        t = noise.sigma_to_t(sigma)
        assert t.shape == sigma.shape and t.dtype == sigma.dtype
    assert float(noise.sigma_to_t(1.0)) == pytest.approx(noise.sigma_to_t(torch.tensor(1.0)).item())


@pytest.mark.parametrize("sigma", [0.05, 0.1, 1.0, 10.0])
def test_latent_timestep_reads_back_as_the_same_sigma(sigma):
    """The official map is off by 180 %, 115 %, 2 % and -32 % here."""
    grid = np.sqrt(1 / np.cumprod(1 - np.linspace(0.0015**0.5, 0.0195**0.5, 1000) ** 2) - 1)
    ours, official = (m.sigma_to_t(torch.tensor(sigma, dtype=torch.float64)) for m in (LATENT, ContinuousVPNoise()))
    believed = [np.exp(np.interp(float(t), np.arange(1000), np.log(grid))) for t in (ours, official)]
    assert abs(believed[0] / sigma - 1) < 1e-12
    error = {0.05: 1.80, 0.1: 1.15, 1.0: 0.02, 10.0: -0.32}[sigma]
    assert believed[1] / sigma - 1 == pytest.approx(error, abs=0.02)


def test_the_map_of_daps_for_stable_diffusion():
    sigma = torch.logspace(-1, 1, 51, dtype=torch.float64)
    noise = ContinuousScaledVPNoise()
    torch.testing.assert_close(noise.t_to_sigma(noise.sigma_to_t(sigma)), sigma, rtol=1e-9, atol=0)
    stable = DiscreteNoise(alphas_cumprod(scaled_linear_betas(1000, 0.00085, 0.012)))
    assert (noise.sigma_to_t(sigma) - 1 - stable.sigma_to_t(sigma)).abs().max() < 2  # index 0 stands after one step


def test_cosine_betas_follow_the_squared_cosine():
    time = np.arange(1, 1000) / 1000
    squared = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(alphas_cumprod(cosine_betas())[:-1], squared, rtol=1e-9)
    assert cosine_betas().max() <= 0.999


@pytest.mark.parametrize(
    "values",
    [[0.9, 0.5, 0.6], [0.9, 0.5, 0.5], [0.5, 0.9], [1.0, 0.5], [0.5, 0.0], [0.5, -0.1], [0.5, float("nan")], [0.5]],
)
def test_grids_that_do_not_decrease_within_0_and_1_are_refused(values):
    with pytest.raises(ValueError, match="decreasing"):
        DiscreteNoise(torch.tensor(values))


def test_a_table_is_refused():
    with pytest.raises(ValueError, match="decreasing"):
        DiscreteNoise(torch.tensor([[0.9, 0.5], [0.8, 0.4]]))


def test_the_table_goes_to_a_device_once(monkeypatch):
    noise, copies, original = DiscreteNoise(alphas_cumprod(linear_betas())), [], torch.Tensor.to

    def to(self, *arguments, **named):
        if len(self) == 1000:
            copies.append(arguments)
        return original(self, *arguments, **named)

    monkeypatch.setattr(torch.Tensor, "to", to)
    for sigma in (0.1, 1.0, 10.0):
        noise.sigma_to_t(torch.tensor([sigma]))
    assert len(copies) <= 1
