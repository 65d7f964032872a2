r"""What a denoiser's network is trained to predict, at which noise levels, and how the levels weigh.

Every target's squared error is a multiple of that of the clean estimate D, so one loss serves all of them:

.. math:: w(\sigma) \, |D(z_0 + \sigma \epsilon; \sigma) - z_0|^2

with SNR = :math:`1 / \sigma^2` (EDM: :math:`\sigma_d^2 / \sigma^2`):

==========  ==================================  ======================================================
target      the network predicts                w of its own squared error
==========  ==================================  ======================================================
``eps``     :math:`\epsilon`                    SNR
``v``       :math:`(\epsilon - \sigma z_0) /    SNR + 1
            \sqrt{1 + \sigma^2}`
``x0``      :math:`z_0`                         1
``flow``    :math:`\epsilon - z_0`              :math:`1 / t^2`, :math:`t = \sigma / (1 + \sigma)`
``edm``     EDM's F (Karras et al. 2022)        :math:`1 / c_{out}^2 = (\sigma^2 + \sigma_d^2) / (\sigma \sigma_d)^2`
==========  ==================================  ======================================================

Min-SNR (Hang et al. 2023) replaces w by min(SNR, gamma) for each: on the noise's own error that is min(SNR, gamma) /
SNR, on v's min(SNR, gamma) / (SNR + 1), on the velocity's min(SNR, gamma) t^2, on EDM's min(SNR, gamma) c_out^2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from particledaps.diffusion.denoiser import (
    EDMDenoiser,
    EpsilonDenoiser,
    FlowDenoiser,
    Network,
    NoiseMap,
    VDenoiser,
    X0Denoiser,
)
from particledaps.diffusion.levels import broadcast_sigma
from particledaps.diffusion.noise import DiscreteNoise, FlowNoise, alphas_cumprod, cosine_betas, zero_terminal_snr
from particledaps.diffusion.score import Denoiser

TrainedDenoiser = EDMDenoiser | EpsilonDenoiser | VDenoiser | X0Denoiser | FlowDenoiser
DENOISERS: dict[str, type[EpsilonDenoiser | VDenoiser | X0Denoiser | FlowDenoiser]] = {
    "eps": EpsilonDenoiser,
    "v": VDenoiser,
    "x0": X0Denoiser,
    "flow": FlowDenoiser,
}
TARGETS = ("edm", *DENOISERS)
SIGMA_RANGE = (0.002, 80.0)
"""Sigmas of the training of ``edm``."""


def noise_map(target: str, terminal: bool) -> NoiseMap | None:
    """The levels of a target's training and their timesteps: time of the flow, or 1000 steps of the cosine schedule.

    Args:
        target: one of :data:`TARGETS`.
        terminal: does the cosine schedule end without signal (Lin et al. 2023)?

    Returns:
        None for ``edm``, whose network is shown ln sigma.
    """
    if target == "edm":
        return None
    if target == "flow":
        return FlowNoise()
    betas = cosine_betas()
    return DiscreteNoise(zero_terminal_snr(betas) if terminal else alphas_cumprod(betas))


def draw_levels(
    target: str,
    shape: Sequence[int],
    noise: NoiseMap | None,
    log_normal: tuple[float, float],
    generator: torch.Generator,
    device: torch.device | str,
) -> torch.Tensor:
    r"""Sigmas of a training batch, one a sample (``(B,)``) or a part of it (``(B, S)``).

    ``edm``: :math:`\ln \sigma` normal, clipped to :data:`SIGMA_RANGE`; ``flow``: time uniform on (0, 1); the others:
    timestep uniform on 0 ... 999.
    """
    if target == "edm":
        mean, std = log_normal
        log_sigma = mean + std * torch.randn(tuple(shape), generator=generator, device=device)
        return log_sigma.exp().clamp(*SIGMA_RANGE)
    assert noise is not None
    if isinstance(noise, FlowNoise):
        times = noise.num_steps * torch.rand(tuple(shape), generator=generator, device=device)
        return noise.t_to_sigma(times).clamp(min=SIGMA_RANGE[0])
    assert isinstance(noise, DiscreteNoise)
    steps = torch.randint(len(noise.sigmas), tuple(shape), generator=generator, device=device)
    return noise.t_to_sigma(steps.float())


def draw_noise(z0: torch.Tensor, offset: float, generator: torch.Generator, device: torch.device | str) -> torch.Tensor:
    r"""Noise :math:`\xi + o \delta` like ``z0``: :math:`\xi` an element, :math:`\delta` a sample and channel.

    Its variance is :math:`1 + o^2`, that of a channel's mean :math:`1 / HW + o^2`. A network trained with o > 0 is no
    posterior mean under white noise.
    """
    noise = torch.randn(z0.shape, generator=generator, device=device)
    if offset == 0:
        return noise
    return noise + offset * torch.randn((*z0.shape[:2], 1, 1), generator=generator, device=device)


def loss_weight(
    target: str, sigma: torch.Tensor, sigma_data: float | torch.Tensor = 1.0, gamma: float | None = None
) -> torch.Tensor:
    """``w(sigma)`` of the module's table, like ``sigma``.

    Args:
        target: one of :data:`TARGETS`.
        sigma: noise levels.
        sigma_data: root mean square of the latents; ``edm`` alone takes it.
        gamma: of min-SNR; None: off.
    """
    scale = torch.as_tensor(sigma_data if target == "edm" else 1.0, dtype=sigma.dtype, device=sigma.device)
    snr = (scale / sigma).square()
    if gamma is not None:
        return snr.clamp(max=gamma)
    if target == "edm":
        return (sigma.square() + scale**2) / (sigma * scale).square()
    if target == "flow":
        return ((1 + sigma) / sigma).square()
    return {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[target]


def denoising_loss(
    denoiser: Denoiser,
    z0: torch.Tensor,
    sigma: torch.Tensor,
    noise: torch.Tensor,
    sigma_data: float | Sequence[float] = 1.0,
    parts: Sequence[int] = (),
    target: str = "edm",
    gamma: float | None = None,
) -> torch.Tensor:
    """Weighted denoising loss per element of each part, summed over the parts, mean over the batch.

    Args:
        denoiser: ``D``.
        z0: ``(B, c, h, w)``.
        sigma: ``(B,)``, or ``(B, S)`` for S parts.
        noise: like ``z0``.
        sigma_data: root mean square of the latents; a number, or one a part.
        parts: channels of each part; empty: one part.
        target: one of :data:`TARGETS`.
        gamma: of min-SNR; None: off.
    """
    levels, parts = sigma.reshape(len(z0), -1), tuple(parts) or (z0.shape[1],)
    scales = [sigma_data] * len(parts) if isinstance(sigma_data, int | float) else sigma_data
    z = z0 + broadcast_sigma(levels, z0, parts) * noise
    squares = (denoiser(z, sigma) - z0).float().square().split(list(parts), dim=1)
    losses = [
        (loss_weight(target, level, scale, gamma) * square.mean((1, 2, 3))).mean()
        for level, scale, square in zip(levels.unbind(1), scales, squares, strict=True)
    ]
    return torch.stack(losses).sum()


def denoiser_of(
    target: str,
    network: Network,
    noise: NoiseMap | None,
    sigma_data: float | Sequence[float] = 1.0,
    noise_scale: float = 0.25,
    parts: Sequence[int] | None = None,
    sigma_min: float = 0.0,
) -> TrainedDenoiser:
    """The denoiser around a network that predicts ``target``; the last four are those of ``edm``."""
    if target == "edm":
        return EDMDenoiser(network, sigma_data, noise_scale, parts, sigma_min)
    assert noise is not None
    return DENOISERS[target](network, noise)


def target_of(denoiser: TrainedDenoiser) -> tuple[str, bool]:
    """What the network of a denoiser predicts, and whether its levels end without signal."""
    target = next((name for name, kind in DENOISERS.items() if type(denoiser) is kind), "edm")
    return target, bool(getattr(getattr(denoiser, "noise", None), "terminal", False))
