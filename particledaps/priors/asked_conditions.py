"""The keys of the model group that say what a prior is told, and when they do not fit it; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from particledaps.priors.errors import PriorError

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
    refuse_interval(asked.guidance_interval)


def interval_fault(interval: Sequence[float] | None) -> str | None:
    """What is wrong with ``model.guidance_interval``, in one sentence; None: it is null, or two ascending sigmas."""
    values = None if interval is None else list(interval)
    if values is None or (len(values) == 2 and 0 <= values[0] <= values[1]):
        return None
    return f"model.guidance_interval={values}: must be [low, high] in sigma, low first and at least 0"


def refuse_interval(interval: Sequence[float] | None) -> None:
    """Raise what :func:`interval_fault` finds.

    Raises:
        PriorError: the interval is none.
    """
    if fault := interval_fault(interval):
        raise PriorError(fault)
