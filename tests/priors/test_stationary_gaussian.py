import pytest
import torch
from analytic import F64, normal

from particledaps.diffusion.analytic import GaussianDenoiser
from particledaps.priors.prior import PriorError
from particledaps.priors.stationary_gaussian import StationaryGaussianDenoiser, build, power_spectrum


def full_spectrum(side, std, exponent):
    f = torch.fft.fftfreq(side, dtype=F64)
    power = (f[:, None] ** 2 + f**2 + (0.5 / side) ** 2) ** (-exponent / 2)
    return power * (std**2 / power.mean())


def covariance(side, std=0.5, exponent=2.0):
    """Of one channel, by its rows: the inverse transform of the spectrum is the autocovariance."""
    autocovariance = torch.fft.ifft2(full_spectrum(side, std, exponent)).real
    index = torch.arange(side)
    difference = (index[:, None] - index) % side
    blocks = autocovariance[difference[:, None, :, None], difference[None, :, None, :]]
    return blocks.reshape(side**2, side**2)


@pytest.mark.parametrize("side", [6, 7])
@pytest.mark.parametrize("sigma", [0.1, 1.0, 7.0])
def test_denoiser_is_that_of_its_covariance_matrix(side, sigma):
    mean = 0.2
    ours = StationaryGaussianDenoiser(power_spectrum(side, side, 0.5)[None], torch.eye(1, dtype=F64), mean)
    matrix = GaussianDenoiser(torch.full((1, side, side), mean, dtype=F64), covariance(side))
    z = normal(3, 1, side, side)
    torch.testing.assert_close(ours(z, sigma), matrix(z, sigma), rtol=1e-9, atol=1e-9)


def test_one_sigma_a_particle():
    denoiser, z = build(side=8).denoiser, normal(2, 3, 8, 8)
    both = denoiser(z, torch.tensor([0.3, 4.0], dtype=F64))
    for row, sigma in enumerate((0.3, 4.0)):
        torch.testing.assert_close(both[row : row + 1], denoiser(z[row : row + 1], sigma))


def test_pixels_have_the_stated_spread_and_power_falls_as_asked():
    assert covariance(8, std=0.3).diagonal().sqrt().tolist() == pytest.approx([0.3] * 64)
    for exponent in (1.0, 2.0, 3.0):
        spectrum = power_spectrum(256, 256, 0.5, exponent)
        assert (spectrum[20, 0] / spectrum[80, 0]).item() == pytest.approx(4.0**exponent, rel=0.01)


def test_colours_are_correlated_and_keep_the_variance():
    """Samples by colouring white noise: a grey pixel is likelier than a saturated one of equal size."""
    denoiser = build(side=16).denoiser
    white = normal(400, 3, 16, 16)
    axes = denoiser.colour_axes
    filtered = torch.fft.irfft2(torch.fft.rfft2(white) * denoiser.spectrum.sqrt(), s=(16, 16))
    samples = torch.einsum("kc,bkhw->bchw", axes, filtered)
    values = samples.transpose(0, 1).flatten(1)
    assert values.var(1).mean().sqrt().item() == pytest.approx(0.5, rel=0.05)
    correlation = torch.corrcoef(values)
    assert correlation[0, 1] > 0.7 and correlation[0, 2] > 0.6
    torch.testing.assert_close(axes @ axes.T, torch.eye(3, dtype=F64), rtol=0, atol=1e-12)


def test_denoising_lowers_the_error_of_a_sample_to_the_closed_form():
    denoiser = build(side=16, channels=1).denoiser
    spectrum = full_spectrum(16, 0.5, 2.0)
    filtered = torch.fft.fft2(normal(500, 1, 16, 16)) * spectrum.sqrt()
    x = torch.fft.ifft2(filtered).real
    error = (denoiser(x + 0.3 * normal(500, 1, 16, 16, seed=1), 0.3) - x).square().mean().item()
    assert error == pytest.approx((spectrum * 0.09 / (spectrum + 0.09)).mean().item(), rel=0.02)


def test_prior():
    prior = build(side=12, channels=1)
    assert prior.image_shape == prior.latent_shape == (1, 12, 12)
    x = normal(2, 1, 12, 12)
    assert torch.equal(prior.decode(x), x) and torch.equal(prior.encode(x), x)


@pytest.mark.parametrize("wrong", [{"side": 1}, {"channels": 2}, {"std": 0.0}, {"exponent": -1.0}])
def test_impossible_priors_are_refused(wrong):
    with pytest.raises(PriorError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        build(**wrong)
