import pytest
import torch
from training_support import CPU, autoencoder_of

from particledaps.data.training_views import step_generator
from particledaps.diffusion.targets import denoising_loss
from particledaps.training.autoencoder import mean_psnr_db, reconstruction_loss
from particledaps.training.denoiser import denoising_errors, latent_bank
from train_prior import standardised


def test_latents_are_standardised_over_training_views(data):
    wrapped = standardised(autoencoder_of(0).network, 2, data, seed=3)
    with torch.no_grad():
        latents = torch.cat([wrapped.encode(data.batch(64, step_generator(8, s))) for s in range(16)])
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(latents.transpose(0, 1).flatten(1).std(1), torch.ones(4), atol=1e-3)
    bank = latent_bank(wrapped, data, 3, seed=3, device=CPU).latents
    assert bank.shape[1:] == (4, 4, 4) and len(bank) >= 3 * len(data.images)
    assert torch.allclose(bank.mean((0, 2, 3)), torch.zeros(4), atol=0.1)


def test_losses_have_their_closed_forms():
    target = torch.zeros(2, 3, 8, 8)
    assert reconstruction_loss(target + 0.5, target, 10.0).item() == pytest.approx(0.25)
    ramp = torch.arange(8.0).expand(2, 3, 8, 8)
    assert reconstruction_loss(ramp, target, 2.0).item() == pytest.approx((ramp**2).mean().item() + 1.0)

    def perfect_but_for_one(z, sigma):
        return torch.ones_like(z)

    sigma, z0 = torch.tensor([0.5, 2.0]), torch.zeros(2, 4, 2, 2)
    expected = sum((s**2 + 9) / (3 * s) ** 2 for s in (0.5, 2.0)) / 2
    assert denoising_loss(perfect_but_for_one, z0, sigma, torch.randn(2, 4, 2, 2), 3.0).item() == pytest.approx(
        expected
    )
    errors = denoising_errors(perfect_but_for_one, z0)
    assert set(errors.values()) == {1.0} and "validation_mse_sigma_0.5" in errors


def test_psnr_of_the_validation_is_a_mean_over_images():
    class Network:
        """Reconstructs black."""

        def encode(self, x):
            return self

        latent_dist = mean = property(lambda self: self)

        def decode(self, z):
            return type("Output", (), {"sample": torch.full((2, 3, 4, 4), -1.0)})

    images = torch.stack([torch.full((3, 4, 4), 0.0), torch.full((3, 4, 4), -0.8)])
    assert mean_psnr_db(Network(), images, 1) == pytest.approx((6.0206 + 20) / 2, abs=1e-3)
