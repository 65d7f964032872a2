r"""Limited-memory BFGS (Nocedal 1980; Liu and Nocedal 1989, algorithm 2.1) on a batch of particles, gradients only.

A posterior's gradient contains a network's score, which has no value to search a line by. So each step is the
quasi-Newton step itself, no longer than :data:`LONGEST`. A pair of differences is left out for a particle whose
curvature along it is not positive, or whose step was so short that the difference of its gradients is their rounding.
"""

from __future__ import annotations

import torch

from particledaps.diffusion.levels import per_particle

MEMORY = 8
LONGEST = 0.1
"""Root mean square of a step, an element."""


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner product of each particle's rows, ``(P,)``."""
    return (a * b).flatten(1).sum(1)


class LBFGS:
    """Steps of a batch that can lose rows.

    Args:
        first: root mean square of the first step, along the gradient.
    """

    def __init__(self, first: float) -> None:
        self.first = first
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.scale: torch.Tensor | None = None
        self.before: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self.pairs = [(s[rows], y[rows]) for s, y in self.pairs]
        if self.before is not None:
            self.before = self.before[0][rows], self.before[1][rows]
        if self.scale is not None:
            self.scale = self.scale[rows]

    def step(self, z: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """The next positions, like ``z`` ``(P, ...)``."""
        first = self.first / root_mean_square(gradient).clamp(min=1e-30)
        self.scale = first if self.before is None else self._compare(z, gradient, first)
        self.before = z, gradient
        direction, undone = gradient, []
        for s, y in reversed(self.pairs):
            inverse = positive_inverse(inner(s, y))
            share = inverse * inner(s, direction)
            direction = direction - per_particle(share, z) * y
            undone.append((inverse, share))
        direction = per_particle(self.scale, z) * direction
        for (inverse, share), (s, y) in zip(reversed(undone), self.pairs, strict=True):
            direction = direction + per_particle(share - inverse * inner(y, direction), z) * s
        length = root_mean_square(direction)
        return z - per_particle((LONGEST / length.clamp(min=1e-30)).clamp(max=1), z) * direction

    def _compare(self, z: torch.Tensor, gradient: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """Add the pair of the last step; its inverse curvature, or ``first`` where it has none, the last one's where
        the step was too short to tell.
        """
        assert self.before is not None and self.scale is not None
        s, y = z - self.before[0], gradient - self.before[1]
        short = root_mean_square(s) < torch.finfo(z.dtype).eps ** (2 / 3) * root_mean_square(z)
        curved = torch.where(short, 0, inner(s, y))
        told = per_particle(curved > 0, z)
        self.pairs = [*self.pairs, (torch.where(told, s, 0), torch.where(told, y, 0))][-MEMORY:]
        scale = torch.where(curved > 0, curved * positive_inverse(inner(y, y)), first)
        return torch.where(short, self.scale, scale)


def positive_inverse(value: torch.Tensor) -> torch.Tensor:
    """1 / value, 0 where it is not positive."""
    return torch.where(value > 0, 1 / value, 0)


def root_mean_square(x: torch.Tensor) -> torch.Tensor:
    """Of each particle's elements, ``(P,)``."""
    return x.square().flatten(1).mean(1).sqrt()
