"""Draw images from a prior: the probability-flow ODE from pure noise.

python generate.py --model assets/cats64 --count 16 --out results/samples.png
"""

if __name__ == "__main__":  # before torch is loaded
    from runs.start_up import begin

    begin("generate.py")

import argparse
import sys
from pathlib import Path

import torch

from diffusion.paths import edm_path
from diffusion.pfode import DiffusionPFODE
from priors.embedded import load_embedded
from priors.prior import Prior, PriorError
from runs.plots import contact_sheet, save_png
from runs.rng import stream
from runs.start_up import exit_stopped, ready

SIGMA_MAX, SIGMA_MIN = 40.0, 0.01


def draw(prior: Prior, count: int, seed: int, num_steps: int = 40) -> torch.Tensor:
    """Samples ``(count, C, H, W)`` in [-1, 1]; sample ``i`` depends on ``seed`` and ``i`` only."""
    noise = torch.stack([torch.randn(prior.latent_shape, generator=stream(seed, i, "generate")) for i in range(count)])
    ode = DiffusionPFODE(prior.denoiser, "heun")
    with torch.no_grad():
        z = ode.solve(SIGMA_MAX * noise, edm_path(num_steps, SIGMA_MAX, SIGMA_MIN))
    return prior.decode(z).clamp(-1, 1)


def draw_samples(prior: Prior, path: Path, seed: int, count: int = 32) -> None:
    """A grid of samples as PNG."""
    images = draw(prior, count, seed)
    tiles = [(image, str(i), False) for i, image in enumerate(images)]
    contact_sheet(
        path, [tiles[i : i + 8] for i in range(0, count, 8)], f"samples of {prior.name} (synthetic), seed {seed}"
    )


def write(prior: Prior, out: Path, seed: int, count: int) -> None:
    """One grid if ``out`` ends in ``.png``, else a folder of single images."""
    single = out.suffix != ".png"
    (out if single else out.parent).mkdir(parents=True, exist_ok=True)
    if not single:
        draw_samples(prior, out, seed, count)
        return
    for index, image in enumerate(draw(prior, count, seed)):
        save_png(out / f"{index:05d}.png", image)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw images from a prior.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "assets" / "cats64")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--out", type=Path, default=Path("results/samples.png"), help="a PNG, or a folder for single images"
    )
    arguments = parser.parse_args()
    if arguments.count < 1:
        parser.error(f"--count {arguments.count}: must be at least 1")
    try:
        write(load_embedded(arguments.model), arguments.out, arguments.seed, arguments.count)
    except (PriorError, OSError) as error:
        sys.exit(f"generate.py: {error}")
    except KeyboardInterrupt as stop:
        exit_stopped("generate.py", stop, "images that are written are kept")


if __name__ == "__main__":
    ready()
    main()
