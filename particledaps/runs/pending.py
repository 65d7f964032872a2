"""Images that are asked for and not read yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from particledaps.data.sources import Source
from particledaps.names import shown

if TYPE_CHECKING:  # whether an image is finished can be told without them
    from particledaps.runs.result import Problem


class Pending:
    """An image that is asked for; read when it is its turn.

    Args:
        image_id: its id.
        name: for people and records.
        source: reads what it comes from.
        load: reads and measures it; raises DataError where it cannot be used.
    """

    def __init__(self, image_id: int, name: str, source: Callable[[], Source], load: Callable[[], Problem]) -> None:
        self.image_id = image_id
        self.name = name
        self._source = source
        self._load = load
        self._known: Source | None = None
        self._kept: Problem | None = None

    @property
    def title(self) -> str:
        """The name as it can be printed."""
        return shown(self.name)

    def source(self) -> Source:
        """What it comes from; computed once."""
        if self._known is None:
            self._known = self._source()
        return self._known

    def load(self, keep: bool = False) -> Problem:
        """The measurement; kept for the next call if that is asked for."""
        problem = self._kept or self._load()
        self._kept = problem if keep else None
        return problem
