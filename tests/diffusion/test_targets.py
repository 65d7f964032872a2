"""What networks are trained to predict: one loss on the clean estimate stands for the error of every target."""

import pytest
import torch

from particledaps.diffusion.noise import DiscreteNoise, FlowNoise
from particledaps.diffusion.targets import (
    TARGETS,
    denoiser_of,
    denoising_loss,
    draw_levels,
    draw_noise,
    loss_weight,
    noise_map,
    target_of,
)

SIGMA_DATA, GAMMA = 0.7, 5.0


def wanted(target, z0, noise, sigma):
    """What the network should say."""
    s = sigma.reshape(-1, 1, 1, 1)
    scale = (1 + s.square()).sqrt()
    c_out = s * SIGMA_DATA / (s.square() + SIGMA_DATA**2).sqrt()
    c_skip = SIGMA_DATA**2 / (s.square() + SIGMA_DATA**2)
    return {
        "eps": noise,
        "v": (noise - s * z0) / scale,
        "x0": z0,
        "flow": noise - z0,
        "edm": (z0 - c_skip * (z0 + s * noise)) / c_out,
    }[target]


@pytest.fixture
def batch(generator):
    z0, noise, error = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    return z0, noise, error, torch.tensor([0.11, 0.9, 6.0], dtype=torch.float64)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gamma", [None, GAMMA])
def test_the_loss_is_the_weighted_error_of_the_networks_own_prediction(target, gamma, batch):
    z0, noise, error, sigma = batch
    answer = wanted(target, z0, noise, sigma) + error
    denoiser = denoiser_of(target, lambda z, t: answer, noise_map(target, False), SIGMA_DATA)
    loss = denoising_loss(denoiser, z0, sigma, noise, SIGMA_DATA, target=target, gamma=gamma)
    own = error.square().mean((1, 2, 3))
    snr = (SIGMA_DATA if target == "edm" else 1) ** 2 / sigma**2
    capped = snr.clamp(max=GAMMA)
    weights = {  # of the network's own error
        "eps": capped / snr,
        "v": capped / (snr + 1),
        "x0": capped,
        "flow": capped * (sigma / (1 + sigma)) ** 2,
        "edm": capped * (sigma * SIGMA_DATA) ** 2 / (sigma**2 + SIGMA_DATA**2),
    }
    expected = own if gamma is None else weights[target] * own
    torch.testing.assert_close(loss, expected.mean(), rtol=2e-6, atol=0)  # the noise map's tables are float32 in part


@pytest.mark.parametrize(
    ("target", "own"),
    [("eps", 1.0), ("v", 5 / 6), ("x0", 5.0), ("flow", 5 / (1 + 5**0.5) ** 2), ("edm", 5 * SIGMA_DATA**2 / 6)],
)
def test_min_snr_weights_where_the_ratio_is_gamma(target, own):
    """Hang et al. 2023, at SNR = gamma = 5; of the network's own error."""
    scale = SIGMA_DATA if target == "edm" else 1.0
    sigma = torch.tensor([scale / GAMMA**0.5], dtype=torch.float64)
    plain = loss_weight(target, sigma, SIGMA_DATA)
    ratio = loss_weight(target, sigma, SIGMA_DATA, GAMMA) / plain
    assert ratio.item() == pytest.approx(own, rel=1e-12)


def test_noise_offset_has_the_variance_of_its_formula(generator):
    offset, side = 0.5, 4
    noise = draw_noise(torch.zeros(20_000, 2, side, side), offset, generator, "cpu")
    assert noise.var().item() == pytest.approx(1 + offset**2, rel=0.02)
    assert noise.mean((2, 3)).var().item() == pytest.approx(1 / side**2 + offset**2, rel=0.03)
    assert (noise - noise.mean((2, 3), keepdim=True)).var().item() == pytest.approx(1 - 1 / side**2, rel=0.01)


@pytest.mark.parametrize("target", TARGETS)
def test_levels_are_those_of_the_target(target, generator):
    noise = noise_map(target, False)
    sigma = draw_levels(target, (50_000,), noise, (-0.4, 1.3), generator, "cpu")
    if target == "edm":
        assert sigma.log().mean().item() == pytest.approx(-0.4, abs=0.03)
        assert sigma.log().std().item() == pytest.approx(1.3, rel=0.02)
    elif target == "flow":
        assert isinstance(noise, FlowNoise) and (sigma / (1 + sigma)).mean().item() == pytest.approx(0.5, abs=0.01)
    else:
        assert isinstance(noise, DiscreteNoise)
        t = noise.sigma_to_t(sigma)
        torch.testing.assert_close(t, t.round(), atol=0.02, rtol=0)
        assert t.mean().item() == pytest.approx(499.5, rel=0.02) and t.min() < 1 and t.max() > 998


def test_a_schedule_without_signal_at_its_end_is_trained_there(generator):
    noise = noise_map("v", True)
    sigma = draw_levels("v", (20_000,), noise, (0.0, 1.0), generator, "cpu")
    assert sigma.max() == noise.sigma_max == 1000
    denoiser = denoiser_of("v", lambda z, t: torch.zeros_like(z), noise)
    assert target_of(denoiser) == ("v", True) and target_of(denoiser_of("edm", None, None)) == ("edm", False)
    z0 = torch.randn(2, 1, 2, 2, generator=generator)
    loss = denoising_loss(denoiser, z0, torch.full((2,), 1000.0), torch.zeros_like(z0), target="v")
    assert loss.item() == pytest.approx(z0.square().mean().item(), rel=1e-4)  # v is -z0 there
