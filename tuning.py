r"""The sampler's values, measured for a prior and a task (``preset=auto``): what is tuned by hand otherwise.

On draws of the prior itself, of which one is measured as the task says:

- the **covariance** of the clean estimate at each noise level, and from it where the annealing begins and ends;
- the **band** in which the basin of the answer is decided: the truth is re-noised to a level, and independent restarts
  from there either end in one image or part;
- the **step size** of the chain from the largest curvature of the data term (power iteration), the **number of steps**
  from the autocorrelation of a chain;
- **tau** from the noise and from what the decoder misses beside it.

A linear task has a kernel that draws exactly, and phase retrieval one that splits amplitudes from the support: they
have neither step size nor autocorrelation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from particledaps.checks import SettingsError
from particledaps.diffusion.chain_measures import autocorrelation_time, largest_curvature
from particledaps.diffusion.covariance import CovarianceTable
from particledaps.diffusion.mcmc import ChainSettings
from particledaps.diffusion.solvers import Solver
from particledaps.diffusion.split_steps import rotation_step
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.particles.clean_estimate import NUM_DRAWS, NUM_STEPS, measured_covariance
from particledaps.particles.data_term import PixelTerm
from particledaps.particles.prior_draws import draw_latents, largest_sigma
from particledaps.paths.schedules import edm_path
from particledaps.streams import ParticleStreams, stream
from sampler import LatentDAPS, SamplerSettings, Start

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior

SEED = 0
LEAST_SIGMA, NUM_SIGMAS = 0.02, 16
SATURATED = 0.9
"""Annealing begins where the estimate's variance has come to this share of its largest, unless a band lies higher."""
LEAST_ERROR = 0.03
"""Annealing ends where the estimate's error, root mean square in pixels, is this or what the autoencoder misses."""
RESTARTS, RESTART_SIGMAS = 4, 7
RESTART_LEVELS = 8
PARTED, JOINED = 0.5, 0.1
"""Shares of the restarts' largest mean square distance where the basin is open, and where it is decided."""
LEAST_RATIO = 4.0
"""There is a band where restarts end so many times further apart, in mean squares, from high noise than from low."""
LEVELS_WITH_BAND, LEVELS_WITHOUT = 60, 25
CURVATURE_STEPS, STEP = 16, 0.25
"""Step size: this over the largest curvature of the data term."""
MOMENTUM, PROBE_STEPS = 0.6, 400
LEAST_STEPS, MOST_STEPS = 8, 60
CG_STEPS, ADMM_STEPS = 40, 12


@dataclass(frozen=True)
class Tuned:
    """What was chosen, in the groups of the configuration's ``sampler``, and what it follows from."""

    values: dict[str, dict[str, Any]]
    measured: dict[str, Any]

    def lines(self) -> list[str]:
        """For people."""
        path, chain = self.values["annealing"], self.values["mcmc"]
        band = self.measured["band"]
        how = f", step size {chain['step_size']:.3g}" if chain["kernel"] == "hmc" else ""
        decided = "restarts do not part"
        if band is not None:
            decided = f"the basin is decided from {band[0]:.3g} to {band[1]:.3g}"
        return [
            f"preset=auto: {path['num_steps']} levels from sigma {path['sigma_max']:.3g} to {path['sigma_min']:.3g} "
            f"({decided}); at most {chain['num_steps']} steps of {chain['kernel']} a level{how}, tau {chain['tau']:.3g}"
        ]


def tune(prior: Prior, operator: Operator, device: torch.device) -> Tuned:
    """Measure and choose.

    Args:
        prior: with one noise level for all of its latents.
        operator: of the task; one that draws a part for each image draws one here.
        device: of the prior.

    Raises:
        SettingsError: the prior's estimates are not finite.
    """
    z0 = draw_latents(prior, NUM_DRAWS, SEED, NUM_STEPS, device, Solver("dpmpp2m"))
    truth = prior.decode(z0)
    operator = operator.for_image(prior.image_shape, stream(SEED, 0, "operator"))
    y = operator.measure(truth[:1], stream(SEED, 0, "measurement"))
    top = largest_sigma(prior)
    grid = [top * (LEAST_SIGMA / top) ** (i / (NUM_SIGMAS - 1)) for i in range(NUM_SIGMAS)] + [0.0]
    table = measured_covariance(prior, torch.tensor(grid, dtype=torch.float64), True, device, z0)
    missed = (prior.decode(prior.encode(truth)) - truth).square().mean().sqrt().item()
    saturated, sigma_min = ends(table, max(missed, LEAST_ERROR))
    tau = misfit(prior, operator, truth[:1], y)
    kernel = kernel_for(operator)
    chain = ChainSettings(kernel, ADMM_STEPS if kernel == "admm" else CG_STEPS)
    curvature = time = None
    if kernel == "hmc":
        middle = math.sqrt(saturated * sigma_min)
        chain, curvature, time = tuned_chain(table, operator, truth[:2], y, tau, middle)
    loop = Loop(prior, operator, table, chain, tau, sigma_min)
    highest = min(2 * saturated, top)
    sigmas = [highest * (sigma_min / highest) ** (i / RESTART_SIGMAS) for i in range(RESTART_SIGMAS)]
    distances = [loop.distance(z0[:1], y, sigma) for sigma in sigmas]
    band = band_of_decision(sigmas, distances)
    values = chosen(chain, band, (saturated, sigma_min, top), tau)
    return Tuned(
        values,
        {
            "estimate_rms": {rounded(s): rounded(table.root_mean_square(s)) for s in table.sigmas},
            "autoencoder_rms": rounded(missed),
            "restart_distance": {rounded(s): rounded(d) for s, d in zip(sigmas, distances, strict=True)},
            "band": None if band is None else [rounded(s) for s in band],
            "noise_sigma": operator.noise_sigma,
            "largest_curvature": None if curvature is None else rounded(curvature),
            "autocorrelation_steps": None if time is None else rounded(time),
        },
    )


def chosen(
    chain: ChainSettings, band: tuple[float, float] | None, sigmas: tuple[float, float, float], tau: float
) -> dict[str, dict[str, Any]]:
    """The groups of the configuration's ``sampler``.

    Args:
        chain: kernel, steps, step size and momentum.
        band: where the basin is decided; None where restarts do not part.
        sigmas: where the estimate knows next to nothing, and all there is to know; the largest of the prior.
        tau: standard deviation of the likelihood.
    """
    saturated, sigma_min, top = sigmas
    return {
        "annealing": {
            "schedule": "edm",
            "num_steps": LEVELS_WITHOUT if band is None else LEVELS_WITH_BAND,
            "sigma_max": rounded(saturated if band is None else min(1.25 * band[0], top)),
            "sigma_min": rounded(sigma_min if band is None else min(sigma_min, band[1] / 3)),
        },
        "ode": {"schedule": "edm", "num_steps": 1, "sigma_min": 0.001, "solver": "euler"},
        "mcmc": {
            "kernel": chain.kernel,
            "num_steps": chain.num_steps,
            "step_size": rounded(chain.step_size) if chain.kernel == "hmc" else 1e-4,
            "step_size_min_ratio": 1.0,
            "momentum": chain.momentum,
            "tau": rounded(tau),
            "space": "pixel",
            "covariance": "measured",
        },
    }


def rounded(value: float) -> float:
    """Four digits: what is chosen does not hang on a machine's rounding."""
    return float(f"{value:.4g}")


def kernel_for(operator: Operator) -> str:
    """The kernel in pixels that needs the least of what is tuned."""
    if operator.linear:
        return "cg"
    return "admm" if isinstance(operator, PhaseRetrieval) else "hmc"


def ends(table: CovarianceTable, least_error: float) -> tuple[float, float]:
    """The sigmas, high and low, at which the clean estimate knows next to nothing, and all but ``least_error``."""
    errors = [table.root_mean_square(sigma) for sigma in table.sigmas]
    if not all(map(math.isfinite, errors)):
        raise SettingsError("preset=auto: the prior returns numbers that are not finite: there is nothing to measure")
    high = next(s for s, e in zip(table.sigmas, errors, strict=True) if e**2 >= SATURATED * errors[-1] ** 2)
    low = next((s for s, e in zip(table.sigmas, errors, strict=True) if e >= least_error), table.sigmas[0])
    return high, min(low, high / 4)


def misfit(prior: Prior, operator: Operator, truth: torch.Tensor, y: torch.Tensor) -> float:
    """Standard deviation of an entry of y around the best that the prior's decoder can say: noise and excess."""
    again = prior.decode(prior.encode(truth))
    excess = (operator.loss(again, y) - operator.loss(truth, y)).clamp(min=0).mean().item()
    known, _ = (prior.misfit_excess or {}).get(operator.name, (0.0, 0.0))
    return (operator.noise_sigma**2 + max(excess, known) / y[0].numel()) ** 0.5


def tuned_chain(
    table: CovarianceTable, operator: Operator, truth: torch.Tensor, y: torch.Tensor, tau: float, sigma: float
) -> tuple[ChainSettings, float, float]:
    """A chain at ``sigma``, the largest curvature that its step follows from, and the steps that it remembers."""
    data, likelihood = PixelTerm(operator, y.expand(len(truth), *y.shape[1:])), 1 / (2 * tau**2)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return likelihood * data(x, True)[1]

    curvature = largest_curvature(gradient, truth, CURVATURE_STEPS, stream(SEED, 0, "curvature")).max().item()
    chain = ChainSettings("hmc", PROBE_STEPS, STEP / max(curvature, 1e-12), MOMENTUM)
    covariance = table.covariance(sigma, truth)
    noise, a = stream(SEED, 1, "curvature"), torch.zeros_like(truth)
    velocity, path = torch.zeros_like(a), []
    for step in range(chain.num_steps):
        force = covariance.to_basis(gradient(truth + covariance.from_basis(a)))
        draw = torch.randn(a.shape, generator=noise).to(a)
        a, velocity = rotation_step(a, velocity, force, covariance.variance, chain.step_size, MOMENTUM, draw)
        if step >= chain.num_steps // 4:  # it began at the truth, not at a draw
            path.append(a)
    time = autocorrelation_time(torch.stack(path))
    steps = min(max(math.ceil(2 * time), LEAST_STEPS), MOST_STEPS)
    return ChainSettings("hmc", steps, chain.step_size, MOMENTUM), curvature, time


class Loop:
    """Independent restarts from a re-noised truth."""

    def __init__(
        self,
        prior: Prior,
        operator: Operator,
        table: CovarianceTable,
        chain: ChainSettings,
        tau: float,
        sigma_min: float,
    ) -> None:
        self.prior, self.operator = prior, operator
        self.table, self.chain = table, chain
        self.tau, self.sigma_min = tau, sigma_min

    def distance(self, z0: torch.Tensor, y: torch.Tensor, sigma: float) -> float:
        """Mean square distance in pixels of the images in which restarts of ``z0`` ``(1, ...)`` at ``sigma`` end.

        Images that the operator cannot tell apart are one image.
        """
        settings = SamplerSettings(
            path=edm_path(RESTART_LEVELS, sigma, min(self.sigma_min, sigma / 2)),
            inner_path=lambda own: torch.tensor([own, 0.0], dtype=torch.float64),
            chain=self.chain,
            step_size_min_ratio=1.0,
            tau=self.tau,
            space="pixel",
            covariance=self.table,
        )
        start = Start(z0.expand(RESTARTS, *z0.shape[1:]), 0)
        loop = LatentDAPS(self.prior, self.operator, settings)
        ended = self.prior.decode(loop.sample(y, ParticleStreams(SEED, 0), range(RESTARTS), start=start).z0_y)
        maps = self.operator.symmetries()
        pairs = [
            min((ended[i] - own.apply(ended[j][None])[0]).square().mean().item() for own in maps)
            for i in range(RESTARTS)
            for j in range(i)
        ]
        return sum(pairs) / len(pairs)


def band_of_decision(sigmas: list[float], distances: list[float]) -> tuple[float, float] | None:
    """The noise levels, high and low, between which restarts begin to part; None where they never do.

    Args:
        sigmas: falling.
        distances: of the images in which restarts end.
    """
    least, most = min(distances), max(distances)
    if not most > LEAST_RATIO * least:
        return None
    share = [(d - least) / (most - least) for d in distances]
    high = next(s for s, own in reversed(list(zip(sigmas, share, strict=True))) if own >= PARTED)
    low = next((s for s, own in zip(sigmas, share, strict=True) if s < high and own <= JOINED), sigmas[-1])
    return high, low
