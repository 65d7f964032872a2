"""A hook of one's own: how far apart four particles are, level by level.

A hook sees the State at five moments (here: after the MCMC of each level), may change it, and logs to Info.

python docs/gallery/own_hook.py           # two minutes; writes own_hook.png
"""

from __future__ import annotations

import matplotlib.pyplot as plt

from particledaps.data.image_sets import demo_images
from particledaps.diffusion.mcmc import ChainSettings
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.paths.schedules import edm_path
from particledaps.priors.embedded import CATS64, load_embedded
from particledaps.streams import ParticleStreams, measurement_generator
from sampler import Hook, Info, LatentDAPS, SamplerSettings, State


class LogSpread(Hook):
    """The standard deviation over particles, before and after the data had their say."""

    def after_mcmc(self, state: State, info: Info) -> State:
        """Log, change nothing."""
        proposed, fitted = (z.std(0).mean().item() for z in (state.z0_hat, state.z0_y))
        info.add("spread", sigma=state.sigma, proposed=proposed, fitted=fitted)
        return state


def main(levels: int = 30, steps: int = 30, out: str = "own_hook.png") -> list[dict]:
    """Draw the spread against sigma; return what was logged."""
    prior, operator = load_embedded(CATS64), PhaseRetrieval(oversample=2.0, noise_sigma=0.05)
    y = operator.measure(demo_images(64).image(1), measurement_generator(42, 1))
    settings = SamplerSettings(
        path=edm_path(levels, sigma_max=10.0, sigma_min=0.1),
        inner_path=lambda sigma: edm_path(2, sigma, 0.001),
        chain=ChainSettings("hmc", num_steps=steps, step_size=4e-5, momentum=0.7),
        step_size_min_ratio=0.12,
        tau=0.00707106781,
    )
    info = Info()
    LatentDAPS(prior, operator, settings, hooks=[LogSpread()]).sample(y, ParticleStreams(42, 1), range(4), info)

    rows = info.rows["spread"]
    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    for name, label in (("proposed", "after the ODE"), ("fitted", "after MCMC")):
        axes.plot([row["sigma"] for row in rows], [row[name] for row in rows], marker=".", label=label)
    axes.set(xscale="log", xlabel="noise level sigma", ylabel="spread of the particles (latent)")
    axes.invert_xaxis()
    axes.legend()
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return rows


if __name__ == "__main__":
    main()
