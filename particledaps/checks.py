"""Errors of a configuration, collected so that a user sees all of them at once."""

from __future__ import annotations

import math
import os
from pathlib import Path

SMALLEST = 1e-15
"""Positive numbers start here: the inverse of their square must fit into float32."""


class SettingsError(ValueError):
    """The configuration cannot be run; the message lists every problem, key by key."""


class DataError(ValueError):
    """The images that a run asks for cannot be used; the message says which and why."""


class Checks:
    """Collects problems so that a user sees all of them at once."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def choice(self, key: str, value: str | None, allowed: tuple[str, ...] | list[str]) -> None:
        if value not in allowed:
            self.problems.append(f"{key}={value}: allowed are {', '.join(allowed)}")

    def folder_name(self, key: str, value: str) -> None:
        path = Path(value)  # the name of "." is empty: results would spill over the folder above
        short = len(os.fsencode(value)) <= 200
        plain = bool(path.name.strip()) and ".." not in path.parts and not path.is_absolute() and "\0" not in value
        self.require(
            plain and short, f"{key}='{value}': must be a plain folder name below save_dir, of 1 to 200 characters"
        )

    def number(self, key: str, value: float | None, low: float, high: float = math.inf, open_low: bool = False) -> None:
        if value is None:
            self.problems.append(f"{key}=null: must be a number")
            return
        inside = (low < value if open_low else low <= value) and value <= high
        if not (math.isfinite(value) and inside):
            upper = f" and at most {high:g}" if math.isfinite(high) else ""
            self.problems.append(
                f"{key}={value:g}: must be {'greater than' if open_low else 'at least'} {low:g}{upper}"
            )
        elif 0 < value < SMALLEST:
            self.problems.append(f"{key}={value:g}: too small to compute with; the least is {SMALLEST:g}")

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            self.problems.append(message)

    def finish(self) -> None:
        if self.problems:
            raise SettingsError("\n".join(self.problems))
