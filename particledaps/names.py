"""File names for people: whatever bytes they hold, they reach terminals, figures and logs as harmless text."""

from __future__ import annotations

import unicodedata

CONTROL = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Kinds of characters that steer a terminal, turn the direction of text, or stand for bytes that are no text."""


def shown(name: str) -> str:
    r"""A name as it can be printed: what is no plain character is written as an escape, ``\x1b`` or ``\udcff``.

    Example:
        >>> shown("a\x1bb")
        'a\\x1bb'
    """
    return "".join(_escaped(c) if unicodedata.category(c) in CONTROL else c for c in name)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")
