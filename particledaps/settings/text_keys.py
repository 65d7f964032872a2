"""Text on the command line stays text: ``name=1.10`` is no number, and a path may hold what Hydra's grammar uses.

Hydra reads every value by its grammar before anything knows its type. Here the values of keys whose type is text are
quoted first, so that they arrive as they were typed.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator
from typing import Union, get_args, get_origin, get_type_hints

ANY_ENTRY = "*"
SWEEPS = re.compile(r"(choice|range|interval|glob|sort|shuffle|tag)\(")


def text_keys(schema: type, prefix: str = "") -> Iterator[tuple[str, bool]]:
    """Dotted names of the keys of a settings dataclass that hold text, and whether they may be null.

    ``*`` stands for any entry of a table.
    """
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        name, hint = prefix + field.name, hints[field.name]
        members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if str in members and float not in members:  # what takes numbers too is read as one where it is one
            yield name, type(None) in members
        elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from text_keys(hint, f"{name}.")
        elif get_origin(hint) is dict:
            entry = get_args(hint)[1]
            if isinstance(entry, type) and dataclasses.is_dataclass(entry):
                yield from text_keys(entry, f"{name}.{ANY_ENTRY}.")


def quote_text(arguments: list[str], schema: type, sweep: bool = False) -> list[str]:
    """The same overrides with the values of text keys quoted for Hydra.

    ``null`` stays null where the key may be null; values that are quoted already stay as they are. In a sweep (``-m``
    among the arguments, or ``sweep``) commas outside of quotes divide a value into several.
    """
    known = dict(text_keys(schema))
    sweep = sweep or any(a in ("-m", "--multirun") for a in arguments)
    return [_quoted_argument(a, known, sweep) for a in arguments]


def _quoted_argument(argument: str, known: dict[str, bool], sweep: bool) -> str:
    key, equals, value = argument.partition("=")
    nullable = _lookup(key.lstrip("+"), known)
    if not equals or nullable is None or argument.startswith(("-", "~")):
        return argument
    if not sweep:
        return f"{key}={_quoted(value, nullable)}"
    if SWEEPS.match(value):
        return argument
    return f"{key}={','.join(_quoted(part, nullable) for part in _parts(value))}"


def _lookup(key: str, known: dict[str, bool]) -> bool | None:
    """Whether a text key may be null; None for other keys."""
    if key in known:
        return known[key]
    names = key.split(".")
    starred = (".".join([*names[:i], ANY_ENTRY, *names[i + 1 :]]) for i in range(len(names)))
    return next((known[s] for s in starred if s in known), None)


def _quoted(value: str, nullable: bool) -> str:
    if value == "" or (nullable and value.lower() == "null") or _is_quoted(value):
        return value
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)  # backslashes before a quote count double
    trailing = escaped[len(escaped.rstrip("\\")) :]
    return f"'{escaped}{trailing}'"


def _is_quoted(value: str) -> bool:
    return len(value) > 1 and value[0] == value[-1] and value[0] in "'\""


def _parts(value: str) -> list[str]:
    """Divide at commas that stand in no quotes and no ``${...}``."""
    return re.findall(r"""(?:'(?:\\.|[^'])*'|"(?:\\.|[^"])*"|\$\{[^}]*\}|[^,])+|(?<=,)(?=,|$)|^(?=,)""", value) or [
        value
    ]
