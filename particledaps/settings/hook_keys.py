"""A hook's settings are the user's keys: one frozen dataclass beside the hook, cut from the flat configuration.

``Settings.every`` of a hook with the prefix ``spread`` is the key ``spread_every``. Ranges and allowed words stand
beside the field, so a key is written once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import GenericAlias
from typing import Any, Protocol, get_args, get_origin, get_type_hints

from particledaps.checks import Checks
from particledaps.settings.keys import NEVER, facts


def key(
    default: Any,
    *,
    low: float | None = None,
    high: float = math.inf,
    open_low: bool = False,
    words: tuple[str, ...] = (),
    name: str | None = None,
    neutral: Any = NEVER,
) -> Any:
    """A field of a hook's settings.

    Args:
        default: immutable; a tuple for a list.
        low: the least value of a number (of each number of a list); None: not checked.
        high: the largest one.
        open_low: the value must be greater than ``low``.
        words: what a text may be.
        name: of the user's key, where it is not ``<prefix>_<field>``.
        neutral: see :func:`particledaps.settings.keys.facts`; a key that is added needs one.
    """
    limits = {"low": low, "high": high, "open_low": open_low, "words": words, "name": name}
    return dataclasses.field(default=default, metadata=facts(neutral=neutral) | limits)


class Keyed(Protocol):
    """A module with a hook's settings, or anything else that has these two."""

    PREFIX: str
    Settings: type


def flat_name(prefix: str, field: dataclasses.Field) -> str:
    """The user's key of a field.

    Example:
        >>> @dataclass
        ... class Settings:
        ...     every: int = key(2, low=1)
        >>> [flat_name("spread", field) for field in dataclasses.fields(Settings)]
        ['spread_every']
    """
    return field.metadata["name"] or f"{prefix}_{field.name}"


def flat_class(name: str, parts: Mapping[str, type]) -> type:
    """A dataclass with the user's keys of several settings, by their prefixes; it is mutable, as Hydra wants it."""
    fields: list[tuple[str, Any, Any]] = []
    for prefix, settings in parts.items():
        hints = get_type_hints(settings)
        for field in dataclasses.fields(settings):
            hint, default = hints[field.name], field.default
            if get_origin(hint) is tuple:
                hint = GenericAlias(list, get_args(hint)[:1])
                own: Any = dataclasses.field(default_factory=partial(list, default), metadata=field.metadata)
            else:
                own = dataclasses.field(default=default, metadata=field.metadata)
            fields.append((flat_name(prefix, field), hint, own))
    return dataclasses.make_dataclass(name, fields)


def cut(prefix: str, settings: type, keys: object) -> Any:
    """The settings that the flat keys hold."""
    values = {f.name: getattr(keys, flat_name(prefix, f)) for f in dataclasses.fields(settings)}
    return settings(**{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def check_ranges(prefix: str, settings: Any, checks: Checks) -> None:
    """Report numbers out of range and words that are not allowed."""
    for field in dataclasses.fields(settings):
        value, facts_ = getattr(settings, field.name), field.metadata
        flat = flat_name(prefix, field)
        if facts_["words"]:
            checks.choice(flat, value, facts_["words"])
        if facts_["low"] is not None and value is not None:
            for number in value if isinstance(value, tuple) else (value,):
                checks.number(flat, number, facts_["low"], facts_["high"], facts_["open_low"])


@dataclass(frozen=True)
class HooksAsked:
    """What a run was asked for: the settings of every hook by prefix, and the particles.

    Attributes:
        num_samples: particles at the start.
        particles: how many of them run here.
        hooks: prefix -> settings.
    """

    num_samples: int
    particles: int
    hooks: Mapping[str, Any]

    def __getitem__(self, prefix: str) -> Any:
        return self.hooks[prefix]

    def problems(self, modules: Mapping[str, Any]) -> Iterator[str]:
        """Values that no run could have, a sentence each: those out of range, then those that exclude each other."""
        for prefix, module in modules.items():
            checks = Checks()
            check_ranges(prefix, self[prefix], checks)
            yield from checks.problems
            yield from module.conflicts(self[prefix], self)
