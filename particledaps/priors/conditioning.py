"""What a prior can be told per call, a class or a text, and guidance: a prior that wraps a prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from particledaps.diffusion.guidance import GuidedDenoiser
from particledaps.diffusion.score import Denoiser
from particledaps.priors.asked_conditions import AskedConditions, refuse_interval, refuse_unfit
from particledaps.priors.errors import PriorError

if TYPE_CHECKING:
    from particledaps.priors.prior import Prior

Condition = int | str
"""A class, or a text."""
KINDS = {"class": int, "prompt": str}


@dataclass(frozen=True)
class Conditions:
    """What a network can be told besides the noise level.

    Attributes:
        kind: ``class`` or ``prompt``.
        build: the denoiser under a condition; the weights are shared.
        null: the condition that says nothing; None: there is none.
        count: of classes.
        names: of the classes, where they are known.
    """

    kind: str
    build: Callable[[Condition], Denoiser]
    null: Condition | None = None
    count: int | None = None
    names: tuple[str, ...] = ()

    def denoiser(self, condition: Condition, owner: str) -> Denoiser:
        """The denoiser under ``condition``; ``owner`` names the prior in messages.

        Raises:
            PriorError: it is of another kind, or no class of the network.
        """
        if type(condition) is not KINDS[self.kind]:
            raise PriorError(f"{condition!r} is no {self.kind}, which is what {owner} takes")
        if self.count is not None and not 0 <= int(condition) < self.count:
            raise PriorError(f"model.class_id={condition}: {owner} knows the classes 0 to {self.count - 1}")
        return self.build(condition)

    def label(self, condition: Condition) -> str:
        """A condition, for records."""
        return f"class {condition}" if self.kind == "class" else f"prompt {condition!r}"


def conditioned(prior: Prior, condition: Condition | None) -> Prior:
    """The same prior under a condition; None: under its null condition.

    Raises:
        PriorError: it is unconditional, takes another kind of condition, or has no null condition.
    """
    conditions = prior.conditions
    if conditions is None:
        raise PriorError(f"{prior.name} is unconditional: it takes no {condition!r}")
    chosen = conditions.null if condition is None else condition
    if chosen is None:
        raise PriorError(f"{prior.name} knows no null condition: name one")
    return replace(prior, denoiser=conditions.denoiser(chosen, prior.name), condition=conditions.label(chosen))


def guided(
    prior: Prior,
    condition: Condition | None,
    scale: float,
    negative: Condition | None = None,
    rescale: float = 0.0,
    interval: Sequence[float] | None = None,
) -> Prior:
    """The same prior, guided: see :class:`particledaps.diffusion.guidance.GuidedDenoiser`.

    Args:
        prior: one that can be conditioned.
        condition: towards what; None: the null condition.
        scale: ``w``; 0: ``negative`` alone, 1: ``condition`` alone.
        negative: away from what; None: the null condition.
        rescale: in [0, 1].
        interval: ``[low, high)`` in sigma; None: everywhere.

    Raises:
        PriorError: the prior is unconditional, has no such condition, or the interval is upside down.
    """
    if prior.conditions is None:
        raise PriorError(f"{prior.name} is unconditional, which cannot be guided")
    refuse_interval(interval)
    toward, away = conditioned(prior, condition), conditioned(prior, negative)
    denoiser = GuidedDenoiser(toward.denoiser, away.denoiser, scale, rescale, interval, prior.parts)
    return replace(toward, denoiser=denoiser, condition=f"{toward.condition}, guidance {scale:g}")


def choose(conditions: Conditions, owner: str, asked: AskedConditions) -> tuple[Condition, Condition | None]:
    """The condition that the keys ask for, and what to guide away from (None: nothing was asked for).

    Raises:
        PriorError: one is needed, and neither is it set nor is there a null condition.
    """
    by_class = conditions.kind == "class"
    chosen: Condition | None = asked.class_id if by_class else asked.prompt
    negative: Condition | None = asked.negative_class_id if by_class else asked.negative_prompt
    chosen = conditions.null if chosen is None else chosen
    if chosen is None:
        last = (conditions.count or 1) - 1
        raise PriorError(f"model.class_id is not set: {owner} knows no null class; choose 0 to {last}")
    if asked.guidance_scale != 1 and negative is None and conditions.null is None:
        raise PriorError(
            f"model.guidance_scale={asked.guidance_scale:g}: {owner} knows no null class to guide away from;"
            " leave it out, or set model.negative_class_id"
        )
    return chosen, negative


def tell(prior: Prior, asked: AskedConditions) -> Prior:
    """Condition and guide a prior as the keys of the model group say.

    Raises:
        PriorError: they do not fit it.
    """
    conditions = prior.conditions
    refuse_unfit(prior.name, None if conditions is None else conditions.kind, asked)
    if conditions is None:
        return prior
    chosen, negative = choose(conditions, prior.name, asked)
    if asked.guidance_scale == 1:
        plain = conditioned(prior, chosen)
        return plain if conditions.kind == "class" else replace(plain, condition=f"{plain.condition}, guidance 1")
    found = guided(prior, chosen, asked.guidance_scale, negative, asked.guidance_rescale, asked.guidance_interval)
    more = [f"negative {negative!r}"] if negative is not None else []
    more += [f"rescale {asked.guidance_rescale:g}"] if asked.guidance_rescale else []
    more += [f"interval {asked.guidance_interval}"] if asked.guidance_interval is not None else []
    if conditions.kind == "class" and not more:  # the label that stored runs have
        return replace(found, condition=conditions.label(chosen))
    return replace(found, condition=", ".join([str(found.condition), *more]))
