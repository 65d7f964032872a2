r"""Does a loaded prior work? Its autoencoder on a photograph, and its denoiser against noise of known size.

A denoiser that knows the data better than a number does must beat shrinking every element alike,

.. math:: D(z) = \frac{s^2}{s^2 + \sigma^2} z, \qquad E|D - z_0|^2 / d = \frac{s^2 \sigma^2}{s^2 + \sigma^2},

with :math:`s^2` the mean square of the latents. And since the error of a posterior mean is orthogonal to every function
of what it saw, :math:`E|z - D|^2 + E|D - z_0|^2 = d \sigma^2`: the quotient of both sides tells a denoiser that is told
another noise level than it gets (a wrong schedule) from one that is merely weak.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from particledaps.data.image_sets import demo_images
from particledaps.diffusion.noise import ContinuousVPNoise, DiscreteNoise
from particledaps.doctor.installation import NOTE, OK, PROBLEM, Finding
from particledaps.evaluation.metrics import psnr_db
from particledaps.priors.cards import Card
from particledaps.priors.prior import Prior
from particledaps.streams import stream

SIGMAS = (0.1, 0.3, 1.0, 3.0, 10.0)
TRUSTED_SIGMA = 1.0
"""Up to here any photograph does; above it a denoiser may rightly expect other images than the test's."""
LOWEST_PSNR_DB, USUAL_PSNR_DB = 15.0, 20.0
BALANCE = (0.8, 1.25)
WIDEST_RANGE = 1.6
SCALES = (0.25, 4.0)
MANY_ELEMENTS = 8_000


def check_prior(prior: Prior, card: Card | None, device: torch.device) -> list[Finding]:
    """All findings on a loaded prior; ``card`` is that of its checkpoint, if it has one."""
    images = demo_images(prior.image_shape[-1], prior.image_shape[0]).pixels.to(device)
    photograph, z = images[:1], prior.encode(images[:1])
    findings = [*shape_findings(prior, z), round_trip(prior, photograph, z), schedule_finding(prior, card)]
    if findings[0].state == PROBLEM:
        return findings
    small = z.numel() < MANY_ELEMENTS
    z0 = prior.encode(images).repeat(4, 1, 1, 1) if small else z  # many small latents are as good as one large
    return [*findings, denoiser_finding(prior, z0)]


def shape_findings(prior: Prior, z: torch.Tensor) -> list[Finding]:
    """Whether latents have the announced shape and about the announced scale."""
    if tuple(z.shape[1:]) != tuple(prior.latent_shape):
        text = f"an image becomes a latent {tuple(z.shape[1:])}, the prior announces {tuple(prior.latent_shape)}"
        return [Finding(PROBLEM, text, "its configuration and its weights do not belong together")]
    shapes = f"{_product(prior.image_shape)} images, {_product(prior.latent_shape)} latents"
    std = z.std().item()
    text = f"{shapes}; latents of the photograph have std {std:.2f} (announced {prior.latent_std:.2f})"
    if not SCALES[0] < std / prior.latent_std < SCALES[1]:
        return [Finding(NOTE, text, "check the autoencoder's scaling factor (1.0 for VQ-f4, 0.18215 for SD)")]
    return [Finding(OK, text)]


def round_trip(prior: Prior, photograph: torch.Tensor, z: torch.Tensor) -> Finding:
    """``decode(encode(photograph))`` against the photograph, in [-1, 1]."""
    decoded = prior.decode(z)
    psnr = psnr_db(decoded, photograph).item()
    low = decoded.min().item()
    high = decoded.max().item()
    text = f"a photograph through the autoencoder and back: {psnr:.1f} dB, values {low:.2f} to {high:.2f}"
    if not psnr >= LOWEST_PSNR_DB:  # also nan
        return Finding(PROBLEM, text, "damaged weights, or another data range than -1 to 1: load the prior anew")
    if psnr < USUAL_PSNR_DB or max(-low, high) > WIDEST_RANGE:
        return Finding(NOTE, text, "fine only if this prior knows images of quite another kind")
    return Finding(OK, text)


def schedule_finding(prior: Prior, card: Card | None) -> Finding:
    """The noise levels that the network knows, held against its card."""
    noise = find_noise_map(prior.denoiser)
    if noise is None:
        return Finding(OK, "the network takes sigma itself, it has no timesteps")
    if isinstance(noise, ContinuousVPNoise):
        state = OK if card is None or (card.schedule or "").startswith("linear") else NOTE
        text = "timesteps by the pixel schedule of DAPS (compat.timestep_map=vp)"
        return Finding(state, text, None if state == OK else "compat.timestep_map=native tells the true noise level")
    if not isinstance(noise, DiscreteNoise):
        return Finding(OK, f"timesteps by {type(noise).__name__}")
    text = f"{len(noise.sigmas)} timesteps, sigma {noise.sigma_min:.3g} to {noise.sigma_max:.3g}"
    expected = None if card is None else card.sigmas()
    if expected is None:
        return Finding(OK, text)
    same = len(expected) == len(noise.sigmas) and torch.allclose(noise.sigmas.cpu().double(), expected, rtol=0.01)
    if same:
        return Finding(OK, f"{text}, as its card says ({card.schedule})")
    wanted = f"its card says {card.schedule}: {len(expected)} timesteps, {expected[0]:.3g} to {expected[-1]:.3g}"
    return Finding(PROBLEM, f"{text}; {wanted}", "convert the checkpoint again")


def find_noise_map(denoiser: object) -> object | None:
    """The map from sigma to timestep of a denoiser or of one that it wraps."""
    modules = denoiser.modules() if isinstance(denoiser, nn.Module) else (denoiser,)
    return next((m.noise for m in modules if hasattr(m, "noise")), None)


@dataclass(frozen=True)
class NoiseTest:
    """The denoiser at one noise level; all per element.

    Attributes:
        sigma: the level.
        error: ``E|D - z0|^2``.
        linear: the same for the best constant shrinkage.
        balance: ``(E|z - D|^2 + E|D - z0|^2) / sigma^2``, 1 for a posterior mean.
    """

    sigma: float
    error: float
    linear: float
    balance: float

    @property
    def worse(self) -> bool:
        """Not better than shrinking, or not a number."""
        return not self.error < self.linear


def measure_denoiser(prior: Prior, z0: torch.Tensor, sigmas: Sequence[float] = SIGMAS) -> list[NoiseTest]:
    """Denoise ``z0`` ``(N, c, h, w)`` with noise of each sigma, always the same draws."""
    noise = torch.randn(z0.shape, generator=stream("doctor", "noise")).to(z0)
    power, tests = z0.square().mean().item(), []
    for sigma in sigmas:
        z = z0 + sigma * noise
        with torch.no_grad():
            estimate = prior.denoiser(z, sigma)
        error, removed = ((estimate - other).square().mean().item() for other in (z0, z))
        tests.append(NoiseTest(sigma, error, power * sigma**2 / (power + sigma**2), (error + removed) / sigma**2))
    return tests


def denoiser_finding(prior: Prior, z0: torch.Tensor) -> Finding:
    """The denoiser against noise of known size, with the table."""
    tests = measure_denoiser(prior, z0)
    table = tuple(_table(tests))
    low = [t for t in tests if t.sigma <= TRUSTED_SIGMA]
    if any(t.worse for t in low):
        remedy = "wrong weights, schedule, condition or latent scale: convert and load the checkpoint anew"
        return Finding(PROBLEM, "the denoiser is no better than shrinking its input", remedy, table)
    if not all(BALANCE[0] <= t.balance <= BALANCE[1] for t in low):
        remedy = "is compat.timestep_map=native, and is it the schedule that the network was trained with?"
        return Finding(NOTE, "the denoiser seems to be told another noise level than it gets", remedy, table)
    if any(t.worse for t in tests):
        remedy = "fine if this prior knows images of another kind than the photograph"
        return Finding(NOTE, "at high noise the denoiser expects other images", remedy, table)
    return Finding(OK, "the denoiser beats the best shrinkage at every noise level", None, table)


def _table(tests: list[NoiseTest]) -> list[str]:
    rows = {
        "sigma": [f"{t.sigma:g}" for t in tests],
        "error of the denoiser": [f"{t.error:.4f}" for t in tests],
        "error of shrinking": [f"{t.linear:.4f}" for t in tests],
        "quotient": [f"{t.error / t.linear:.2f}" for t in tests],
        "balance (1 is exact)": [f"{t.balance:.2f}" for t in tests],
    }
    return [f"{name:<22}" + "".join(f"{value:>9}" for value in values) for name, values in rows.items()]


def _product(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
