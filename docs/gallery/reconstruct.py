"""Reconstruct a photograph from its Fourier magnitudes: the annealing loop without the application around it.

python docs/gallery/reconstruct.py        # two minutes on two cores; writes reconstruct.png
"""

from __future__ import annotations

import torch
from torchvision.utils import save_image

from particledaps.data.image_sets import demo_images
from particledaps.diffusion.mcmc import ChainSettings
from particledaps.evaluation.metrics import psnr_db
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.paths.schedules import edm_path
from particledaps.priors.embedded import CATS64, load_embedded
from particledaps.streams import ParticleStreams, measurement_generator
from sampler import LatentDAPS, SamplerSettings


def main(levels: int = 30, steps: int = 30, out: str = "reconstruct.png") -> torch.Tensor:
    """Write the truth, then four particles, best fit first; return their losses ``(4,)`` in that order."""
    prior, operator = load_embedded(CATS64), PhaseRetrieval(oversample=2.0, noise_sigma=0.05)
    x = demo_images(64).image(1)  # a synthetic cat, (1, 3, 64, 64) in [-1, 1]; 0 is the photograph
    y = operator.measure(x, measurement_generator(seed=42, image_id=1))

    chain = ChainSettings("hmc", num_steps=steps, step_size=4e-5, momentum=0.7)
    settings = SamplerSettings(
        path=edm_path(levels, sigma_max=10.0, sigma_min=0.1),
        inner_path=lambda sigma: edm_path(2, sigma, 0.001),
        chain=chain,
        step_size_min_ratio=0.12,
        tau=0.00707106781,
    )
    state = LatentDAPS(prior, operator, settings).sample(y, ParticleStreams(seed=42, image_id=1), range(4))

    images = prior.decode(state.z0_y)
    loss, order = operator.loss(images, y.expand(4, -1, -1, -1)).sort()
    images = images[order].clamp(-1, 1)
    save_image(torch.cat([x, images]) / 2 + 0.5, out)
    print("loss:", loss.tolist())
    print("PSNR in dB, as they are:", psnr_db(images, x.expand_as(images)).tolist())
    return loss


if __name__ == "__main__":
    main()
