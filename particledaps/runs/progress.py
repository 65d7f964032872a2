"""Progress: bars on a terminal; in a file or a cluster's log a line every half minute and one at each image's end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, Self, TextIO

from tqdm import tqdm

LINE_SECONDS = 30.0
RUN_BAR = "run: {percentage:3.0f}%|{bar}| {desc}"
Clock = Callable[[], float]


def hms(seconds: float) -> str:
    """``1:02:03``."""
    return str(timedelta(seconds=round(seconds)))


class Lines:
    """Writes whole lines, one in :data:`LINE_SECONDS` at most; the first is due that long after the start."""

    def __init__(self, stream: TextIO, clock: Clock) -> None:
        self.stream = stream
        self.clock = clock
        self.last = clock()

    def due(self) -> bool:
        """Whether another line may be written."""
        return self.clock() - self.last >= LINE_SECONDS

    def write(self, text: str) -> None:
        """Write one, due or not."""
        self.last = self.clock()
        print(text, file=self.stream, flush=True)


class RunProgress:
    """What is done of a run, and about how long the rest will take.

    Seconds left = seconds since the first image began / images done since * images left, parts of images counted.

    Args:
        total: images that are asked for.
        stream: where to write; stderr.
        clock: seconds, counted from anywhere.
    """

    def __init__(self, total: int, stream: TextIO | None = None, clock: Clock = time.monotonic) -> None:
        self.total, self.clock = total, clock
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.lines = Lines(self.stream, clock)
        self.begun: set[str] = set()
        self.first, self.part = clock(), 0.0
        self.bar: tqdm | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def skip(self) -> None:
        """An image that was asked for needs no work here: it is finished already, unreadable, or left to another."""
        self.total -= 1
        self._show()

    @contextmanager
    def image(self, name: str, levels: int) -> Iterator[ImageProgress]:
        """Progress of one image; one that is begun again under the same name counts once."""
        if not self.begun:
            self.first = self.clock()
        self.begun.add(name)
        own = ImageProgress(self, name, levels)
        self._advance(0.0)
        try:
            yield own
            self._advance(1.0)
            own.end()
        finally:
            self._advance(1.0)
            own.close()

    def close(self) -> None:
        """Leave the terminal to others."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    @property
    def done(self) -> float:
        """Images that are done, with the part of the one in work."""
        return max(len(self.begun) - 1, 0) + self.part

    def seconds_left(self) -> float | None:
        """Of the run, an estimate; None as long as nothing is done."""
        return (self.clock() - self.first) / self.done * max(self.total - self.done, 0) if self.done else None

    def left(self) -> str:
        """``about 0:10:00 left``, or nothing where nobody knows."""
        seconds = self.seconds_left()
        return "" if seconds is None else f", about {hms(seconds)} left"

    def _advance(self, part: float) -> None:
        self.part = part
        if self.terminal and self.bar is None:
            self.bar = tqdm(total=self.total, file=self.stream, position=0, bar_format=RUN_BAR, dynamic_ncols=True)
        self._show()

    def _show(self) -> None:
        if self.bar is not None:
            self.bar.total, self.bar.n = self.total, min(self.done, self.total)
            self.bar.set_description_str(f"{int(self.done)} of {self.total} images{self.left()}")


class ImageProgress:
    """Levels that one image has behind it."""

    def __init__(self, run: RunProgress, name: str, levels: int) -> None:
        self.run = run
        self.name = name
        self.levels = levels
        self.number = 0
        self.detail = ""
        self.started = run.clock()
        self.bar: tqdm | None = None
        if run.terminal:
            self.bar = tqdm(
                total=levels, desc=name, unit="level", file=run.stream, position=1, leave=False, dynamic_ncols=True
            )

    def level(self, detail: str) -> None:
        """One more is done; ``detail`` says where it left the particles."""
        self.number, self.detail = self.number + 1, detail
        self.levels = max(self.levels, self.number)  # children go through some levels again
        self.run._advance(self.number / self.levels)
        if self.bar is not None:
            self.bar.total = self.levels
            self.bar.set_postfix_str(detail, refresh=False)
            self.bar.update()
        elif self.run.lines.due():
            seconds = f"{hms(self.run.clock() - self.started)} of the image"
            level = f"level {self.number} of {self.levels}"
            self.run.lines.write(f"{self.name}: {level}, {detail}, {seconds}{self.run.left()} in the run")

    def end(self) -> None:
        """Say that all levels are done."""
        run, spent = self.run, hms(self.run.clock() - self.started)
        detail = f", {self.detail}" if self.detail else ""
        images = f"{int(run.done)} of {run.total} images{run.left()}"
        text = f"{self.name}: 100%, {self.number} levels in {spent}{detail}; {images}"
        if self.bar is None:
            run.lines.write(text)
        else:
            self.bar.clear()
            tqdm.write(text, file=run.stream)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()


class Steps(Protocol):
    """What counts the steps of a training, or other units."""

    def update(self, n: int = 1) -> object:
        """So many more are done."""

    def set_postfix(self, values: Mapping[str, str]) -> object:
        """Numbers to show beside it."""

    def close(self) -> None:
        """No more follow."""


class StepLines:
    """The same as a bar of tqdm, in lines; see :func:`step_progress`."""

    def __init__(self, total: int, initial: int, name: str, stream: TextIO, clock: Clock, unit: str = "step") -> None:
        self.total = total
        self.unit = unit
        self.initial = initial
        self.number = initial
        self.name = name
        self.clock = clock
        self.lines = Lines(stream, clock)
        self.values = ""
        self.started = clock()

    def update(self, n: int = 1) -> None:
        """So many more are done."""
        self.number += n
        if self.lines.due():
            self._write()

    def set_postfix(self, values: Mapping[str, str]) -> None:
        """Numbers to show from now on."""
        self.values = "".join(f", {name} {value}" for name, value in values.items())

    def close(self) -> None:
        """Say where it ended."""
        self._write()

    def _write(self) -> None:
        spent, own = self.clock() - self.started, self.number - self.initial
        rest = self.total - self.number
        left = f", about {hms(spent / own * rest)} left" if own and rest > 0 else ""
        self.lines.write(f"{self.name}: {self.unit} {self.number} of {self.total}{self.values}, {hms(spent)}{left}")


def step_progress(
    total: int,
    initial: int,
    name: str,
    stream: TextIO | None = None,
    clock: Clock = time.monotonic,
    unit: str = "step",
) -> Steps:
    """Counts the steps of a training, or other units: a bar on a terminal, else lines.

    Args:
        total: steps of the whole training.
        initial: those that an earlier process has done.
        name: of the stage.
        stream: where to write; stderr.
        clock: seconds, counted from anywhere.
        unit: what is counted.
    """
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        return tqdm(total=total, initial=initial, desc=name, unit=unit, file=stream)
    return StepLines(total, initial, name, stream, clock, unit)
