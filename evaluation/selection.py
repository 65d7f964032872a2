"""Choose one answer without the truth: from the measurement and the prior alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evaluation.orientation import plausibility_loss
from operators.operator import Symmetry
from priors.prior import Prior

RULE = "lowest_loss_then_orientation"


@dataclass(frozen=True)
class Selection:
    """The chosen answer.

    Attributes:
        index: position of the chosen particle.
        symmetry: name of the symmetry to apply to it.
        rule: the rule's name.
        scores: the data loss of each particle, lower is better.
        plausibility: denoising loss of the chosen particle under each symmetry, lower is better.
    """

    index: int
    symmetry: str
    rule: str
    scores: list[float]
    plausibility: dict[str, float]


def select(prior: Prior, x: torch.Tensor, loss: torch.Tensor, symmetries: Sequence[Symmetry]) -> Selection:
    """The particle with the lowest data loss, turned the way the prior finds most plausible.

    The measurement cannot tell an image from its twin (equal loss), and the prior cannot tell how well the
    measurement is met: each decides what it knows.

    Args:
        prior: used for the orientation only.
        x: ``(P, C, H, W)`` reconstructions in [-1, 1].
        loss: ``(P,)`` data losses, all finite.
        symmetries: the operator's natural ambiguities.
    """
    index = int(loss.argmin())
    views = torch.cat([s.apply(x[index : index + 1]) for s in symmetries])
    plausibility = plausibility_loss(prior, views.clamp(-1, 1)).tolist()
    names = [s.name for s in symmetries]
    best = min(range(len(names)), key=plausibility.__getitem__)
    return Selection(index, names[best], RULE, loss.tolist(), dict(zip(names, plausibility, strict=True)))
