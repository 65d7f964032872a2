"""An operator of one's own: only the upper half of an image is seen; the prior draws several lower halves.

python docs/gallery/own_operator.py       # about a minute; writes own_operator.png
"""

from __future__ import annotations

import torch
from torchvision.utils import save_image

from particledaps.data.image_sets import demo_images
from particledaps.diffusion.mcmc import ChainSettings
from particledaps.operators.operator import LinearOperator
from particledaps.paths.schedules import edm_path
from particledaps.priors.embedded import CATS64, load_embedded
from particledaps.streams import ParticleStreams, measurement_generator
from sampler import LatentDAPS, SamplerSettings


class UpperRows(LinearOperator):
    """The upper rows of an image."""

    name = "upper_rows"

    def __init__(self, keep_rows: int = 32, noise_sigma: float = 0.05) -> None:
        self.keep_rows, self.noise_sigma = keep_rows, noise_sigma

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``(B, C, H, W)`` in [-1, 1] -> ``(B, C, keep_rows, W)``."""
        return x[..., : self.keep_rows, :]

    def adjoint(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        """A^T y: rows of zeros below."""
        return torch.nn.functional.pad(y, (0, 0, 0, image_shape[1] - self.keep_rows))

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """The shape of y, for an image ``(C, H, W)``."""
        return image_shape[0], self.keep_rows, image_shape[2]


def main(levels: int = 40, steps: int = 10, out: str = "own_operator.png") -> float:
    """Write the truth, the measurement (black below) and four answers; return the misfit over what noise explains."""
    prior, operator = load_embedded(CATS64), UpperRows()
    x = demo_images(64).image(2)
    y = operator.measure(x, measurement_generator(42, 2))
    settings = SamplerSettings(
        path=edm_path(levels, sigma_max=10.0, sigma_min=0.1),
        inner_path=lambda sigma: edm_path(10, sigma, 0.01),
        chain=ChainSettings("hmc", num_steps=steps, step_size=1e-4, momentum=0.5),
        step_size_min_ratio=0.5,
        tau=0.05,
    )
    state = LatentDAPS(prior, operator, settings).sample(y, ParticleStreams(42, 2), range(4))
    images, (expected, deviation) = prior.decode(state.z0_y), operator.noise_floor(y)
    loss = operator.loss(images, y.expand(4, -1, -1, -1))
    seen = operator.adjoint(y + 1, prior.image_shape) - 1
    save_image(torch.cat([x, seen, images]).clamp(-1, 1) / 2 + 0.5, out)
    print(f"loss: {loss.tolist()}; the truth's: {expected.item():.1f} +- {deviation.item():.1f}")
    return (loss.mean() / expected).item()


if __name__ == "__main__":
    main()
