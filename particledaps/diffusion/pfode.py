"""The probability-flow ODE in sigma, with an additive term in the score."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from particledaps.diffusion.levels import broadcast_sigma
from particledaps.diffusion.score import Denoiser
from particledaps.diffusion.solvers import euler_step, heun_step, intervals

SOLVERS = ("euler", "heun")


class DiffusionPFODE:
    r"""Deterministic reverse diffusion (Karras et al. 2022, eq. 1 and algorithm 1).

    .. math:: \frac{dz}{d\sigma} = -\sigma (\nabla_z \log p(z; \sigma) + s \, r)
        = \frac{z - D(z; \sigma)}{\sigma} - \sigma s \, r

    The sampler decides on the repulsion term ``r`` and its scale ``s``, the prior only denoises, and this class owns
    the drift. Without a term (or after :meth:`clear_repulsion`) the ODE is the plain one, bit for bit.

    Args:
        denoiser: the prior's denoiser ``D``.
        solver: ``euler`` (one call an interval) or ``heun`` (two, second order; the last interval to 0 is Euler).
        parts: channels of each part of z with noise of its own, where paths are ``(N + 1, S)``; None: equal ones.

    Example:
        A prior that knows one image takes every z to it in one step.

        >>> ode = DiffusionPFODE(lambda z, sigma: torch.zeros_like(z))
        >>> ode.solve(torch.full((1, 1, 1, 1), 7.0), torch.tensor([7.0, 0.0])).item()
        0.0
    """

    def __init__(self, denoiser: Denoiser, solver: str = "euler", parts: Sequence[int] | None = None) -> None:
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r}: allowed are {', '.join(SOLVERS)}")
        self.denoiser, self.solver = denoiser, solver
        self.parts = parts
        self._repulsion: tuple[torch.Tensor, torch.Tensor | float] | None = None

    def set_repulsion(self, term: torch.Tensor, scale: torch.Tensor | float) -> None:
        """Add ``scale * term`` to the score from now on.

        Args:
            term: ``(P, C, H, W)`` direction in latent space.
            scale: a number, or one a particle ``(P,)``; applied here and nowhere else.
        """
        self._repulsion = (term, scale)

    def clear_repulsion(self) -> None:
        """Back to the plain ODE."""
        self._repulsion = None

    def derivative(self, z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        """``dz / dsigma`` at ``sigma`` > 0."""
        s = broadcast_sigma(sigma, z, self.parts)
        drift = (z - self.denoiser(z, sigma)) / s
        if self._repulsion is None:
            return drift
        term, scale = self._repulsion
        return drift - s * broadcast_sigma(scale, z) * term

    def solve(self, z: torch.Tensor, path: torch.Tensor) -> torch.Tensor:
        """Integrate ``z`` along ``path`` from its first to its last node.

        Args:
            z: ``(P, C, H, W)`` at noise level ``path[0]``.
            path: descending sigmas ``(N + 1,)``, or ``(N + 1, S)`` for S parts with noise of their own, or
                ``(N + 1, P, S)`` where particles stand at different levels.
        """
        step = heun_step if self.solver == "heun" else euler_step
        for here, there in intervals(path):
            z = step(self.derivative, z, here, there, self.parts)
        return z
