"""A prior of one's own: a denoiser in closed form, here the Gaussian of natural images (power 1 / f^2).

A prior needs a denoiser D(z; sigma) = E[z0 | z0 + sigma * noise = z] and an autoencoder (pixels: the identity).

python docs/gallery/own_prior.py          # a few seconds; writes own_prior.png
"""

from __future__ import annotations

import torch
from torchvision.utils import save_image

from particledaps.data.image_sets import demo_images
from particledaps.diffusion.levels import broadcast_sigma
from particledaps.diffusion.mcmc import ChainSettings
from particledaps.evaluation.metrics import psnr_db
from particledaps.operators.inpainting import RandomInpainting
from particledaps.paths.schedules import edm_path
from particledaps.priors.autoencoder import IdentityAutoencoder
from particledaps.priors.prior import Prior
from particledaps.streams import ParticleStreams, measurement_generator, operator_generator
from sampler import LatentDAPS, SamplerSettings


class WienerDenoiser:
    """Gaussian images whose power at frequency f is S(f): D = mean + F^-1 S / (S + sigma^2) F (z - mean)."""

    def __init__(self, side: int, mean: float = 0.0, variance: float = 0.25) -> None:
        f = torch.fft.fftfreq(side)[:, None].square() + torch.fft.rfftfreq(side)[None].square()
        spectrum = 1 / (f + 0.5 / side**2)
        full = torch.fft.irfft2(spectrum, s=(side, side))[0, 0]  # variance of a pixel
        self.power, self.mean = variance * spectrum / full, mean

    def __call__(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        """The posterior mean; ``z`` (P, C, H, W), ``sigma`` a number or one a particle."""
        s2 = broadcast_sigma(sigma, z).square()
        filtered = torch.fft.rfft2(z - self.mean) * self.power / (self.power + s2)
        return self.mean + torch.fft.irfft2(filtered, s=z.shape[-2:])


def main(levels: int = 40, steps: int = 50, out: str = "own_prior.png") -> float:
    """Write the truth, what is seen of it, two samples of the posterior and their mean; return its PSNR in dB."""
    shape = (3, 64, 64)
    prior = Prior("wiener", IdentityAutoencoder(), WienerDenoiser(64), shape, shape, latent_std=0.5)
    x = demo_images(64).image(0)
    operator = RandomInpainting(noise_sigma=0.05).for_image(shape, operator_generator(42, 0))
    y = operator.measure(x, measurement_generator(42, 0))

    settings = SamplerSettings(
        path=edm_path(levels, sigma_max=10.0, sigma_min=0.05),
        inner_path=lambda sigma: edm_path(5, sigma, 0.01),
        chain=ChainSettings("hmc", num_steps=steps, step_size=2e-4, momentum=0.5),
        step_size_min_ratio=0.5,
        tau=0.05,
    )
    z = LatentDAPS(prior, operator, settings).sample(y, ParticleStreams(42, 0), range(16)).z0_y
    mean = z.mean(0, keepdim=True)
    save_image(torch.cat([x, y, z[:2], mean]).clamp(-1, 1) / 2 + 0.5, out)
    print("PSNR in dB of one sample:", psnr_db(z[:1], x).item(), "of the mean of 16:", psnr_db(mean, x).item())
    return psnr_db(mean, x).item()


if __name__ == "__main__":
    main()
