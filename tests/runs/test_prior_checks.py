"""The examination of a prior: right where the answer is known, and not fooled by the usual faults."""

import dataclasses

import pytest
import torch
from analytic import F64, gaussian_prior, normal, prior_of
from torch import nn

from particledaps.diffusion.analytic import GaussianDenoiser
from particledaps.diffusion.denoiser import EDMDenoiser, EpsilonDenoiser
from particledaps.diffusion.noise import (
    ContinuousVPNoise,
    DiscreteNoise,
    alphas_cumprod,
    linear_betas,
    scaled_linear_betas,
)
from particledaps.doctor.installation import NOTE, OK, PROBLEM
from particledaps.doctor.prior import check_prior, denoiser_finding, measure_denoiser, round_trip, schedule_finding
from particledaps.priors.autoencoder import IdentityAutoencoder
from particledaps.priors.cards import read_cards
from particledaps.priors.prior import Prior

CARDS = read_cards()
VARIANCES = torch.logspace(-5, 0.5, 48, dtype=F64)  # most directions are as smooth as a photograph's
NATIVE = DiscreteNoise(alphas_cumprod(scaled_linear_betas()))


class GaussianNoise(nn.Module):
    """The exact noise prediction for N(0, diag(VARIANCES)) of a network with the timesteps of ``noise``."""

    def __init__(self, noise=NATIVE):
        super().__init__()
        self.learnt, self.denoiser = noise, GaussianDenoiser(torch.zeros(48, 1, 1, dtype=F64), torch.diag(VARIANCES))

    def forward(self, x, t):
        sigma = self.learnt.t_to_sigma(t)
        z = x * (1 + sigma[:, None, None, None].square()).sqrt()
        return (z - self.denoiser(z, sigma)) / sigma[:, None, None, None]


def latents(count=400):
    return normal(count, 48, 1, 1) * VARIANCES[:, None, None].sqrt()


def prior_with(denoiser):
    return prior_of(denoiser, (48, 1, 1))


def test_a_posterior_mean_is_balanced_and_its_error_is_known():
    prior = gaussian_prior(torch.zeros(48, dtype=F64), torch.diag(VARIANCES))
    for test in measure_denoiser(prior, latents(4000)):
        exact = (VARIANCES * test.sigma**2 / (VARIANCES + test.sigma**2)).mean().item()
        assert test.error == pytest.approx(exact, rel=0.05) and test.balance == pytest.approx(1, abs=0.02)
        assert not test.worse


def test_a_network_that_knows_its_timesteps_is_fine():
    finding = denoiser_finding(prior_with(EpsilonDenoiser(GaussianNoise(), NATIVE)), latents())
    assert finding.state == OK and len(finding.table) == 5


@pytest.mark.parametrize("wrong", [ContinuousVPNoise(), DiscreteNoise(alphas_cumprod(linear_betas()))])
def test_a_network_that_is_told_other_levels_is_noticed(wrong):
    finding = denoiser_finding(prior_with(EpsilonDenoiser(GaussianNoise(), wrong)), latents())
    assert finding.state in (NOTE, PROBLEM) and "schedule" in finding.remedy


@pytest.mark.parametrize(
    "denoiser",
    [
        lambda z, sigma: z,
        lambda z, sigma: torch.zeros_like(z),
        lambda z, sigma: z + sigma * normal(*z.shape, seed=3),
        lambda z, sigma: z * float("nan"),
        lambda z, sigma: -GaussianDenoiser(torch.zeros(48, 1, 1, dtype=F64), torch.diag(VARIANCES))(z, sigma),
    ],
    ids=["identity", "zero", "random", "nan", "sign"],
)
def test_what_does_not_denoise_is_a_problem(denoiser):
    assert denoiser_finding(prior_with(denoiser), latents()).state == PROBLEM


def test_a_denoiser_of_other_images_fails_only_at_high_noise():
    smooth = GaussianDenoiser(torch.full((48, 1, 1), 2.0, dtype=F64), torch.diag(VARIANCES))

    def elsewhere(z, sigma):  # exact at low noise, and far away at high noise
        return smooth(z - 2, sigma) + 2 if sigma > 1 else smooth(z + 2, sigma) - 2

    finding = denoiser_finding(prior_with(elsewhere), latents())
    assert finding.state == NOTE and "high noise" in finding.text


# --- the autoencoder -------------------------------------------------------------------------------------------------


class Ranged(IdentityAutoencoder):
    """Decodes to [0, 1] instead of [-1, 1]."""

    def decode(self, z):
        return z / 2 + 0.5


class Broken(IdentityAutoencoder):
    def decode(self, z):
        return z * float("nan")


class Scaled(IdentityAutoencoder):
    """Latents that were not multiplied by their scaling factor."""

    def encode(self, x):
        return x * 12

    def decode(self, z):
        return z / 12


def image_prior(autoencoder=None, side=32):
    shape = (3, side, side)
    denoiser = GaussianDenoiser(torch.zeros(shape, dtype=torch.float32), 0.25)
    return dataclasses.replace(prior_of(denoiser, shape, autoencoder), latent_std=0.5)


def states(prior, card=None):
    return [finding.state for finding in check_prior(prior, card, torch.device("cpu"))]


def test_a_photograph_survives_the_identity():
    findings = check_prior(image_prior(), None, torch.device("cpu"))
    assert "80.0 dB" in findings[1].text and findings[0].state == findings[1].state == OK
    assert "3x32x32 images, 3x32x32 latents" in findings[0].text


@pytest.mark.parametrize("autoencoder", [Ranged(), Broken()])
def test_another_data_range_is_a_problem(autoencoder):
    assert states(image_prior(autoencoder))[1] == PROBLEM


def test_a_forgotten_scaling_factor_is_noticed():
    findings = check_prior(image_prior(Scaled()), None, torch.device("cpu"))
    assert findings[0].state == NOTE and "scaling factor" in findings[0].remedy


def test_a_poor_round_trip_is_a_note():
    prior, photograph = image_prior(), normal(1, 3, 32, 32).float().clamp(-1, 1)
    assert round_trip(prior, photograph, photograph + 0.25 * normal(1, 3, 32, 32, seed=1)).state == NOTE


def test_a_latent_of_another_shape_ends_the_examination():
    prior = dataclasses.replace(image_prior(), latent_shape=(4, 8, 8))
    assert states(prior)[0] == PROBLEM and len(states(prior)) == 3


# --- the schedule ----------------------------------------------------------------------------------------------------


def scheduled(noise):
    return Prior("p", IdentityAutoencoder(), EpsilonDenoiser(GaussianNoise(), noise), (48, 1, 1), (48, 1, 1))


@pytest.mark.parametrize(
    "noise, card, state, words",
    [
        (NATIVE, "ldm_ffhq256", OK, "0.0388 to 83.8, as its card says"),
        (NATIVE, "ffhq256", PROBLEM, "its card says linear 0.0001 0.02 1000"),
        (DiscreteNoise(alphas_cumprod(scaled_linear_betas(500))), "ldm_ffhq256", PROBLEM, "500 timesteps"),
        (NATIVE, None, OK, "1000 timesteps"),
        (ContinuousVPNoise(), "ldm_imagenet256", NOTE, "compat.timestep_map=vp"),
        (ContinuousVPNoise(), "imagenet256", OK, "compat.timestep_map=vp"),
    ],
)
def test_the_schedule_is_held_against_the_card(noise, card, state, words):
    finding = schedule_finding(scheduled(noise), CARDS.get(card))
    assert finding.state == state and words in finding.text


def test_a_network_without_timesteps_has_no_schedule():
    prior = prior_with(EDMDenoiser(nn.Identity()))
    assert "takes sigma itself" in schedule_finding(prior, None).text
    assert schedule_finding(prior_with(lambda z, sigma: z), None).state == OK
