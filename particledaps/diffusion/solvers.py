r"""Steps of the probability-flow ODE and its stochastic kin, along a path of sigmas.

Every step takes ``z`` from the noise level ``here`` to ``there``: numbers, or ``(1, S)`` / ``(P, S)`` where the parts
of z have levels of their own. A part whose level does not change stays as it is. Where ``there`` is 0 the step ends at
the denoiser's estimate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from particledaps.diffusion.levels import broadcast_sigma
from particledaps.diffusion.score import Denoiser

FLOOR = 1e-6
"""Sigma that a part already at 0 shows to the denoiser while other parts still move; its own step is 0."""
SOLVERS = ("euler", "ddim", "heun", "dpmpp2m", "unipc", "consistency")
STOCHASTIC = ("consistency",)
"""Solvers that draw noise whatever their settings; ``ddim`` does where eta > 0."""

Slope = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""``slope(z, sigma)`` is ``dz / dsigma``."""
Parts = Sequence[int] | None
Draw = Callable[[], "torch.Tensor"]
"""Standard normal noise like z, one call after the other."""


def intervals(path: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The levels of each step of a path: neighbouring rows, numbers, ``(1, S)`` (from ``(S,)``) or ``(P, S)``."""
    for here, there in itertools.pairwise(path):
        yield (here[None], there[None]) if here.ndim == 1 else (here, there)


def euler_step(slope: Slope, z: torch.Tensor, here: torch.Tensor, there: torch.Tensor, parts: Parts) -> torch.Tensor:
    r"""First order: :math:`z + (\sigma' - \sigma) \, dz/d\sigma` (Karras et al. 2022); DDIM with eta 0."""
    step = broadcast_sigma(there, z, parts) - broadcast_sigma(here, z, parts)
    return z + step * slope(z, here.clamp(min=FLOOR))


def heun_step(slope: Slope, z: torch.Tensor, here: torch.Tensor, there: torch.Tensor, parts: Parts) -> torch.Tensor:
    """Second order (Karras et al. 2022, algorithm 1): two calls; a part that ends at 0 takes the Euler step."""
    step = broadcast_sigma(there, z, parts) - broadcast_sigma(here, z, parts)
    first = slope(z, here.clamp(min=FLOOR))
    proposal = z + step * first
    if not bool((there > 0).any()):
        return proposal
    second = slope(proposal, there.clamp(min=FLOOR))
    return z + step * torch.where(broadcast_sigma(there, z, parts) > 0, (first + second) / 2, first)


def ddim_step(
    z: torch.Tensor, z0: torch.Tensor, here: torch.Tensor, there: torch.Tensor, eta: float, draw: Draw, parts: Parts
) -> torch.Tensor:
    r"""DDIM (Song et al. 2021, eq. 12 and 16) in the coordinates of this project.

    .. math:: z' = z_0 + \sqrt{\sigma'^2 - s^2} \, (z - z_0) / \sigma + s \, \xi, \qquad
        s = \eta \, \sigma' \sqrt{\sigma^2 - \sigma'^2} / \sigma

    Args:
        z: at ``here``.
        z0: the denoiser's estimate there.
        here: sigma.
        there: the next sigma.
        eta: 0 is the ODE, 1 ancestral sampling (DDPM).
        draw: the noise; not called at eta 0.
        parts: channels of each part.
    """
    s, t = (broadcast_sigma(level, z, parts) for level in (here.clamp(min=FLOOR), there))
    same = broadcast_sigma(here, z, parts) == t
    added = eta * t * (s.square() - t.square()).clamp(min=0).sqrt() / s
    moved = z0 + (t.square() - added.square()).clamp(min=0).sqrt() * (z - z0) / s
    return torch.where(same, z, moved + added * draw() if eta > 0 else moved)


def dpmpp_2m_step(
    z: torch.Tensor,
    z0: torch.Tensor,
    here: torch.Tensor,
    there: torch.Tensor,
    previous: tuple[torch.Tensor, torch.Tensor] | None,
    parts: Parts,
) -> torch.Tensor:
    r"""DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    With :math:`h = \ln(\sigma / \sigma')` and :math:`r = h_{prev} / h`:

    .. math:: \bar D = (1 + 1 / 2r) D - D_{prev} / 2r, \qquad z' = (\sigma' / \sigma) z + (1 - e^{-h}) \bar D

    The first step, and one that ends at 0, are of first order.

    Args:
        z: at ``here``.
        z0: the denoiser's estimate there.
        here: sigma.
        there: the next sigma.
        previous: the estimate of the step before and its sigma; None: this is the first step.
        parts: channels of each part.
    """
    s, t = (broadcast_sigma(level, z, parts) for level in (here.clamp(min=FLOOR), there))
    same = broadcast_sigma(here, z, parts) == t
    ratio, estimate = t / s, z0
    if previous is not None:
        before = broadcast_sigma(previous[1], z, parts)
        h, h_before = (s / t.clamp(min=FLOOR)).log(), (before / s).log()
        usable = (t > 0) & (h > 0) & (h_before > 0)
        half = torch.where(usable, h / (2 * h_before.clamp(min=1e-12)), torch.zeros_like(h))
        estimate = (1 + half) * z0 - half * previous[0]
    return torch.where(same, z, ratio * z + (1 - ratio) * estimate)


Visited = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""A node of the path behind: z there, the denoiser's estimate, sigma."""


def unipc_correction(
    z: torch.Tensor, z0: torch.Tensor, here: torch.Tensor, behind: Visited, before: Visited | None, parts: Parts
) -> torch.Tensor:
    r"""UniC of order 2 (Zhao et al. 2023, algorithm 5, B(h) = e^h - 1): the last step again, with the new estimate.

    With :math:`h = \ln(\sigma_- / \sigma)`, :math:`r = h_- / h`, :math:`E = e^{-h} - 1`,
    :math:`\phi = -E / h - 1` and the weights of :math:`\rho_1 + \rho_2 = \phi / E`,
    :math:`-r \rho_1 + \rho_2 = 2 (-\phi / h - 1/2) / E`:

    .. math:: z' = (\sigma / \sigma_-) z_- - E \left(D_- + \rho_1 (D_- - D_{--}) / r + \rho_2 (D - D_-)\right)

    The first step takes :math:`\rho_1 = 0, \rho_2 = 1/2`. No further call: the next step uses D as it is.

    Args:
        z: as it was predicted at ``here``; kept where the level did not change.
        z0: the denoiser's estimate there.
        here: sigma.
        behind: the node where the step began.
        before: the node before that; None: it was the first step.
        parts: channels of each part.
    """
    last, estimate, level = behind
    s, t = broadcast_sigma(level, z, parts), broadcast_sigma(here, z, parts)
    h = (s / t.clamp(min=FLOOR)).log().clamp(min=1e-12)
    e = torch.expm1(-h)
    change, first = (z0 - estimate) / 2, torch.zeros_like(z0)
    if before is not None:
        h_before = (broadcast_sigma(before[2], z, parts) / s).log()
        usable = h_before > 0
        r = torch.where(usable, h_before / h, torch.ones_like(h))
        phi = -e / h - 1
        one, two = phi / e, 2 * (-phi / h - 0.5) / e
        rho = (one - two) / (1 + r)
        first = torch.where(usable, rho / r, torch.zeros_like(h)) * (estimate - before[1])
        change = torch.where(usable, one - rho, torch.full_like(h, 0.5)) * (z0 - estimate)
    return torch.where(s == t, z, t / s * last - e * (estimate + first + change))


def consistency_step(
    z: torch.Tensor, z0: torch.Tensor, here: torch.Tensor, there: torch.Tensor, draw: Draw, parts: Parts
) -> torch.Tensor:
    r"""Denoise, then re-noise (Song et al. 2023, algorithm 1): :math:`z' = z_0 + \sigma' \xi`."""
    s, t = (broadcast_sigma(level, z, parts) for level in (here, there))
    return torch.where(s == t, z, z0 + t * draw() if bool((there > 0).any()) else z0)


@dataclass(frozen=True)
class Solver:
    """A solver with its settings.

    Attributes:
        name: one of :data:`SOLVERS`.
        eta: of ``ddim``, 0 to 1.

    Raises:
        ValueError: there is no such solver, or ``eta`` is not its.
    """

    name: str = "heun"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in SOLVERS:
            raise ValueError(f"solver={self.name!r}: allowed are {', '.join(SOLVERS)}")
        if not 0 <= self.eta <= 1 or (self.eta > 0 and self.name != "ddim"):
            raise ValueError(f"eta={self.eta:g}: must be from 0 to 1, and only solver=ddim takes it")

    @property
    def draws(self) -> bool:
        """Does it draw noise?"""
        return self.name in STOCHASTIC or self.eta > 0

    def calls(self, path: torch.Tensor) -> int:
        """Denoiser calls along a path: one a step; of Heun two, but for a last step to 0."""
        steps = len(path) - 1
        return 2 * steps - int(not bool((path[-1] > 0).any())) if self.name == "heun" else steps

    def solve(
        self, denoiser: Denoiser, z: torch.Tensor, path: torch.Tensor, draw: Draw | None = None, parts: Parts = None
    ) -> torch.Tensor:
        """Take ``z`` along ``path`` from its first to its last node.

        Args:
            denoiser: ``D``.
            z: ``(P, C, H, W)`` at noise level ``path[0]``.
            path: descending sigmas ``(N + 1,)``, or ``(N + 1, S)`` for S parts.
            draw: noise, where the solver draws some.
            parts: channels of each part, where the path has columns.

        Raises:
            ValueError: noise is needed, and there is no ``draw``.
        """
        if draw is None and self.draws:
            raise ValueError(f"solver={self.name} draws noise: give draw")
        noise = draw if draw is not None else lambda: torch.zeros_like(z)

        def slope(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            return (x - denoiser(x, sigma)) / broadcast_sigma(sigma, x, parts)

        behind: list[Visited] = []
        for here, there in intervals(path.to(z.device)):
            if self.name in ("euler", "heun"):
                z = (euler_step if self.name == "euler" else heun_step)(slope, z, here, there, parts)
                continue
            z0 = denoiser(z, here.clamp(min=FLOOR))
            if self.name == "ddim":
                z = ddim_step(z, z0, here, there, self.eta, noise, parts)
            elif self.name in ("dpmpp2m", "unipc"):
                if self.name == "unipc" and behind:
                    z = unipc_correction(z, z0, here, behind[-1], behind[-2] if len(behind) > 1 else None, parts)
                before = behind[-1][1:] if behind else None
                behind = [*behind[-1:], (z, z0, here)]
                z = dpmpp_2m_step(z, z0, here, there, before, parts)
            else:
                z = consistency_step(z, z0, here, there, noise, parts)
        return z
