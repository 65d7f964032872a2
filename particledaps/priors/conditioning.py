"""What a prior can be told per call, a class or a text, and guidance: a prior that wraps a prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from particledaps.diffusion.guidance import GuidedDenoiser
from particledaps.diffusion.score import Denoiser
from particledaps.priors.errors import PriorError

if TYPE_CHECKING:
    from particledaps.priors.prior import Prior

Condition = int | str
"""A class, or a text."""
KINDS = {"class": int, "prompt": str}
TAKES_NONE = {
    "prompt": "holds no network that takes a text",
    "negative_prompt": "holds no network that takes a text",
    "class_id": "holds no network that takes a class",
    "negative_class_id": "holds no network that takes a class",
    "guidance_scale": "holds an unconditional network, which cannot be guided",
    "guidance_rescale": "holds an unconditional network, which cannot be guided",
    "guidance_interval": "holds an unconditional network, which cannot be guided",
}
"""Keys of the model group, and what a prior that knows no such thing is said to hold."""
DEFAULTS = {"prompt": "", "guidance_scale": 1.0, "guidance_rescale": 0.0}
"""Of those keys that are not null."""
FITTING = {
    "class": ("class_id", "negative_class_id", "guidance_scale", "guidance_rescale", "guidance_interval"),
    "prompt": ("prompt", "negative_prompt", "guidance_scale", "guidance_rescale", "guidance_interval"),
    None: (),
}
"""Keys by what a prior can be told."""


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
    label = f"class {chosen}" if conditions.kind == "class" else f"prompt {chosen!r}"
    return replace(prior, denoiser=conditions.denoiser(chosen, prior.name), condition=label)


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
    limits = None if interval is None else check_interval(interval)
    toward, away = conditioned(prior, condition), conditioned(prior, negative)
    parts = prior.parts if len(prior.parts) > 1 else None
    denoiser = GuidedDenoiser(toward.denoiser, away.denoiser, scale, rescale, limits, parts)
    return replace(toward, denoiser=denoiser, condition=f"{toward.condition}, guidance {scale:g}")


def check_interval(interval: Sequence[float]) -> tuple[float, float]:
    """Two sigmas in ascending order.

    Raises:
        PriorError: they are not.
    """
    values = list(interval)
    if len(values) != 2 or not all(type(v) in (int, float) for v in values) or not 0 <= values[0] <= values[1]:
        raise PriorError(
            f"model.guidance_interval={values}: must be [low, high] in sigma, 0 or more, low first (w is 1 outside)"
        )
    return float(values[0]), float(values[1])


class AskedConditions(Protocol):
    """The keys of the model group that say what a prior is told."""

    class_id: int | None
    prompt: str
    guidance_scale: float
    negative_class_id: int | None
    negative_prompt: str | None
    guidance_rescale: float
    guidance_interval: list[float] | None


def refuse_unfit(name: str, kind: str | None, asked: AskedConditions) -> None:
    """Refuse keys that a prior which takes ``kind`` (None: nothing) does not know, or that would do nothing.

    Raises:
        PriorError: one of them is set.
    """
    for key, sentence in TAKES_NONE.items():
        value = getattr(asked, key)
        if key not in FITTING[kind] and value != DEFAULTS.get(key):
            raise PriorError(f"model.{key}={value!r}: {name} {sentence}; leave it out")
    if asked.guidance_scale == 1:
        for key in ("negative_class_id", "negative_prompt", "guidance_rescale", "guidance_interval"):
            value = getattr(asked, key)
            if value != DEFAULTS.get(key):
                raise PriorError(f"model.{key}={value!r}: changes nothing at model.guidance_scale=1; set that too")
    if asked.guidance_interval is not None:
        check_interval(asked.guidance_interval)


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
    return replace(found, condition=_label(found, negative, asked, conditions.kind == "class"))


def _label(found: Prior, negative: Condition | None, asked: AskedConditions, by_class: bool) -> str | None:
    """For records. A class under plain guidance keeps the label that stored runs have: the class alone."""
    more = [f"negative {negative!r}"] if negative is not None else []
    more += [f"rescale {asked.guidance_rescale:g}"] if asked.guidance_rescale else []
    more += [f"interval {asked.guidance_interval}"] if asked.guidance_interval is not None else []
    if by_class and not more:
        return (found.condition or "").partition(", guidance")[0]
    return ", ".join([found.condition or "", *more])
