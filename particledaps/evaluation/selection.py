r"""Choose one answer without the truth: from the measurement and the prior alone.

Rules, all "lower is better":

- ``loss``: the data loss :math:`L = |A(x) - y|^2`.
- ``high_snr``: the data loss over the entries of y that stand clear of the noise.
- ``plausibility``: the prior's denoising loss, of the more plausible twin.
- ``posterior``: :math:`L / 2 \tau^2 - \log p(x)` in nats, the second term from the denoising losses.
- ``fresh2``: the first particle, unless the data loss of a later one is lower by more than a margin (the two chains of
  github.com/Cheng-HanHuang/pr_diffusion).

Whatever the rule, the chosen particle is then turned the way that the prior finds most plausible: the measurement
cannot tell an image from its twin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from particledaps.evaluation.orientation import plausibility_loss, posterior_energy

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator, Symmetry
    from particledaps.priors.prior import Prior

RULES = ("loss", "high_snr", "plausibility", "posterior", "fresh2")


@dataclass(frozen=True)
class Candidates:
    """The images to choose from.

    Attributes:
        images: ``(P, C, H, W)`` reconstructions in [-1, 1].
        loss: ``(P,)`` their data losses, all finite.
        y: ``(1, ...)`` the measurement.
        tau: standard deviation of the likelihood in ``posterior``: the noise, or more where the decoder cannot
            represent the truth; None: the operator's noise.
        margin: by how much a later particle's data loss must be lower in ``fresh2``.
    """

    images: torch.Tensor
    loss: torch.Tensor
    y: torch.Tensor
    tau: float | None = None
    margin: float = 0.0


@dataclass(frozen=True)
class Selection:
    """The chosen answer.

    Attributes:
        index: position of the chosen particle.
        symmetry: name of the symmetry to apply to it.
        rule: the rule's name and ``then_orientation``.
        scores: of each particle under the rule, lower is better.
        plausibility: denoising loss of the chosen particle under each symmetry, lower is better.
    """

    index: int
    symmetry: str
    rule: str
    scores: list[float]
    plausibility: dict[str, float]


def select(prior: Prior, operator: Operator, candidates: Candidates, rule: str = "loss") -> Selection:
    """The best particle under ``rule``, turned the way the prior finds most plausible.

    Args:
        prior: judges plausibility.
        operator: its losses and ambiguities.
        candidates: the images.
        rule: one of :data:`RULES`.
    """
    symmetries = operator.symmetries()
    scores = score_candidates(prior, operator, candidates, rule)
    index = first_unless_lower(scores, candidates.margin) if rule == "fresh2" else int(scores.argmin())
    plausibility = twin_plausibility(prior, candidates.images[index : index + 1], symmetries)[:, 0].tolist()
    names = [s.name for s in symmetries]
    best = min(range(len(names)), key=plausibility.__getitem__)
    named = dict(zip(names, plausibility, strict=True))
    return Selection(index, names[best], f"{rule}_then_orientation", scores.tolist(), named)


def score_candidates(prior: Prior, operator: Operator, candidates: Candidates, rule: str) -> torch.Tensor:
    """Scores ``(P,)`` under one of :data:`RULES`, lower is better.

    Raises:
        ValueError: there is no such rule.
    """
    if rule in ("loss", "fresh2"):
        return candidates.loss
    if rule == "high_snr":
        return operator.high_snr_loss(candidates.images, candidates.y)
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: must be one of {', '.join(RULES)}")
    plausibility = twin_plausibility(prior, candidates.images, operator.symmetries()).amin(0)
    if rule == "plausibility":
        return plausibility
    tau = operator.noise_sigma if candidates.tau is None else candidates.tau
    return posterior_energy(prior, plausibility, candidates.loss, tau)


def first_unless_lower(losses: torch.Tensor, margin: float) -> int:
    """The first of ``losses`` ``(P,)``, unless a later one is lower than what was kept by more than ``margin``.

    Example:
        >>> first_unless_lower(torch.tensor([70.0, 69.5, 68.0, 67.9]), margin=0.7)
        2
    """
    kept = 0
    for index, loss in enumerate(losses.tolist()):
        if loss < losses[kept].item() - margin:
            kept = index
    return kept


def twin_plausibility(prior: Prior, x: torch.Tensor, symmetries: Sequence[Symmetry]) -> torch.Tensor:
    """Denoising losses ``(G, P)`` of images ``(P, C, H, W)`` under each of G symmetries, the same noise for all."""
    views = torch.cat([s.apply(x) for s in symmetries])
    return plausibility_loss(prior, views.clamp(-1, 1)).reshape(len(symmetries), len(x))
