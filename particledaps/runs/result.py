"""One measurement, and what its reconstruction came to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from particledaps.data.sources import Source
from particledaps.evaluation.metrics import Scores
from particledaps.evaluation.modes import Modes
from particledaps.evaluation.selection import Selection
from particledaps.names import shown
from particledaps.operators.operator import Operator


@dataclass(frozen=True)
class Problem:
    """One measurement and what is known of it.

    Attributes:
        image_id: id in the data set.
        name: for file names and tables.
        origin: photograph, synthetic, data or measured.
        operator: of this image, with its mask or kernel.
        y: ``(1, ...)``.
        truth: ``(1, C, H, W)`` in [-1, 1], or None.
        source: the file, row or picture that it comes from.
        noise: where the operator's noise level comes from: ``given``; or, with ``task.noise_sigma=auto``, ``shown`` by
            y, ``effective`` (beside the image), or still unknown: ``silent``, ``symmetrised``.
    """

    image_id: int
    name: str
    origin: str
    operator: Operator
    y: torch.Tensor
    truth: torch.Tensor | None
    source: Source
    noise: str = "given"

    @property
    def title(self) -> str:
        """The name for people, without what a terminal or a figure could take for more than text."""
        return shown(self.name)

    def to(self, device: torch.device) -> Problem:
        """The same with its measurement and truth on ``device``."""
        return replace(self, y=self.y.to(device), truth=None if self.truth is None else self.truth.to(device))


@dataclass(frozen=True)
class Result:
    """Reconstructions of one measurement, without diverged particles.

    Attributes:
        problem: what was reconstructed.
        images: ``(P, C, H, W)`` decoded, clipped to [-1, 1].
        loss: ``(P,)`` data loss of the decoded images, not clipped.
        particle_ids: id of each row.
        diverged_ids: ids that are missing.
        selection: the chosen answer, None if every particle diverged.
        scores: metrics against the truth, None without truth or particles.
        modes: labels against the truth, None without truth or particles.
        agreed: did two lineages of restarts agree? None where nobody asked or there was one lineage.
    """

    problem: Problem
    images: torch.Tensor
    loss: torch.Tensor
    particle_ids: list[int]
    diverged_ids: list[int]
    selection: Selection | None
    scores: Scores | None
    modes: Modes | None
    agreed: bool | None = None
