"""``compat=daps`` on a latent network of the real kind, against the official formulas written out by hand.

Facts: DAPS 098df6b (sampler.py, cores/scheduler.py, cores/mcmc.py, model/precond.py, forward_operator).
"""

import math
from dataclasses import replace

import pytest
import torch
from omegaconf import OmegaConf
from tiny_checkpoints import write_card, write_ldm_ffhq

import posterior_sample  # noqa: F401 (registers the schema)
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.settings.build import build_prior
from particledaps.settings.command_line import compose_config
from particledaps.streams import ParticleStreams
from plan import loop_settings
from sampler import Info, LatentDAPS

LEVELS, STEPS, IDS = 50, 5, [0, 3]
RATE, RATE_RATIO, MOMENTUM, TAU, NOISE = 2.1e-5, 0.12, 0.41, 0.01, 0.05


def grid(intervals, sigma_max, sigma_min, rho=7):
    """EDM spacing (Karras et al. 2022, eq. 5)."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return [(high + i / intervals * (low - high)) ** rho for i in range(intervals + 1)]


def pixel_timestep(sigma):
    """DAPS's ``VPPrecond`` for every network: beta_d 19.9, beta_min 0.1, M 1000."""
    return 999 * (math.sqrt(0.1**2 + 2 * 19.9 * math.log(1 + sigma**2)) - 0.1) / 19.9


def euler(unet, z, sigma):
    """The inner ODE: two Euler steps that end at 0.001."""
    nodes = grid(2, sigma, 0.001)
    for here, there in zip(nodes, nodes[1:], strict=False):
        epsilon = unet(z / math.sqrt(1 + here**2), torch.tensor([pixel_timestep(here)])).sample
        denoised = z - here * epsilon
        z = z + (there - here) * (z - denoised) / here
    return z


def amplitude(x):
    """Centred orthonormal Fourier magnitudes of the padded image in [0, 1], full plane."""
    margin = int(2.0 / 8 * x.shape[-1])
    padded = torch.nn.functional.pad(x / 2 + 0.5, (margin,) * 4)
    centred = torch.fft.ifftshift(padded, dim=(-2, -1))
    return torch.fft.fftshift(torch.fft.fftn(centred, dim=(-2, -1), norm="ortho"), dim=(-2, -1)).abs()


def loss_gradient(autoencoder, z, y):
    """Through operator, decoder and quantisation (straight through), clamped to [-1, 1] elementwise."""
    z = z.detach().requires_grad_(True)
    loss = (amplitude(autoencoder.decode(z).sample) - y).square().sum()
    return torch.autograd.grad(loss, z)[0].clamp(-1, 1)


def official_level(unet, autoencoder, y, z, level, steps, streams):
    """One annealing level: ODE, MCMC, re-noising. Returns ``z0_hat``, ``z0_y`` and the next ``z``."""
    sigmas = [*grid(LEVELS, 10.0, 0.1)[:-1], 0.0]
    sigma = sigmas[level]
    with torch.no_grad():
        centre = euler(unet, z, sigma)
    generators = streams.generators(IDS, "mcmc", level, z.device)
    draw = lambda: torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])  # noqa: E731
    rate = RATE * (1 + level / (LEVELS + 1) * (RATE_RATIO - 1))
    state, velocity = centre.clone(), draw()
    for _ in range(steps):
        force = -loss_gradient(autoencoder, state, y) / TAU**2 + (centre - state) / sigma**2
        velocity = MOMENTUM * velocity + math.sqrt(rate) * force + math.sqrt(2 * (1 - MOMENTUM)) * draw()
        state = state + math.sqrt(rate) * velocity
    noise = streams.normal(IDS, "renoise", level, z)
    return centre, state, state + sigmas[level + 1] * noise


def prepare(folder, steps=STEPS):
    """Prior, sampler settings and operator of ``compat=daps`` for the LDM checkpoint in ``folder``."""
    model = ("model=ffhq256ldm", f"model.path={folder}")
    config = compose_config("config", [*model, "compat=daps", f"sampler.mcmc.num_steps={steps}"])
    settings = OmegaConf.to_object(config)
    prior = build_prior(settings.model, settings.compat, "float32", None, torch.device("cpu"))
    return prior, loop_settings(settings, prior.is_pixel), PhaseRetrieval(2.0, NOISE)


def compare(folder, level, steps=STEPS):
    """Largest differences of ``z0_hat``, ``z0_y`` and the next ``z``, relative to the size of each."""
    prior, settings, operator = prepare(folder, steps)
    streams, generator = ParticleStreams(5, 11), torch.Generator().manual_seed(level)
    truth = prior.decode(torch.randn(1, *prior.latent_shape, generator=generator)).clamp(-1, 1)
    y = operator.measure(truth, generator)
    loop = LatentDAPS(prior, operator, settings)
    state = loop.start(y, streams, IDS)
    sigma = settings.path[level].item()
    z = torch.randn(state.z.shape, generator=generator) * math.sqrt(1 + sigma**2)
    ours = next(loop.levels(replace(state, z=z, level=torch.full_like(state.level, level)), Info()))
    networks = prior.denoiser.network.unet, prior.autoencoder.network
    theirs = official_level(*networks, y, z, level, steps, streams)
    return [
        ((a - b).abs().max() / b.abs().max()).item()
        for a, b in zip((ours.z0_hat, ours.z0_y, ours.z), theirs, strict=True)
    ]


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    """The FFHQ latent network with fewer channels, random weights, raw ones as DAPS uses them."""
    folder = tmp_path_factory.mktemp("daps") / "ldm"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        write_ldm_ffhq(folder)
    write_card(folder, "ldm_ffhq256", 32, ema=False, latent_scale=1.0)
    return folder


@pytest.mark.parametrize("level", [0, 20, 49])
def test_one_level_follows_the_official_formulas(reduced, level):
    assert max(compare(reduced, level)) < 1e-4


def test_other_timesteps_differ_from_them(reduced, monkeypatch):
    """The comparison can fail: with other timesteps the ODE goes elsewhere."""
    monkeypatch.setitem(globals(), "pixel_timestep", lambda sigma: pixel(sigma) / 2)
    assert max(compare(reduced, 20)) > 1e-3


pixel = pixel_timestep


def test_pixel_priors_are_not_clamped(checkpoints):
    overrides = ["model=ffhq256ddpm", f"model.path={checkpoints['adm']}", "compat=daps"]
    settings = OmegaConf.to_object(compose_config("config", overrides))
    prior = build_prior(settings.model, settings.compat, "float32", None, torch.device("cpu"))
    assert loop_settings(settings).gradient_clamp == 1.0
    assert loop_settings(settings, prior.is_pixel).gradient_clamp is None
