"""Seconds and peak GPU memory of each phase of a run."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from particledaps.particles.state import Hook, Info, State
from particledaps.settings.device import synchronise


class Seconds(NamedTuple):
    """Seconds on the wall, and those that this process and its children spent computing, on all threads together."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Seconds:
        """From some beginning."""
        return cls(time.perf_counter(), sum(os.times()[:4]))

    def until_now(self) -> Seconds:
        """What went by since then."""
        now = self.now()
        return Seconds(now.wall - self.wall, now.cpu - self.cpu)


@dataclass
class PhaseTime:
    """Totals of one phase."""

    seconds: float = 0.0
    steps: int = 0
    peak_vram_mb: float | None = None


@dataclass
class PhaseClock:
    """Splits one image's run into named phases.

    The device is synchronised at each boundary and the CUDA peak counter is reset there.

    Attributes:
        device: where the run computes.
        phases: totals by phase name, in order of first appearance.
        step_seconds: seconds of every annealing level.
    """

    device: torch.device
    phases: dict[str, PhaseTime] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    _current: str | None = None
    _started: float = 0.0
    _last_lap: float = 0.0

    def enter(self, name: str) -> None:
        """Leave the current phase and start ``name``."""
        self.leave()
        self.phases.setdefault(name, PhaseTime())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        first = self._last_lap == 0.0
        self._current, self._started = name, time.perf_counter()
        if first:
            self._last_lap = self._started

    def skip(self, name: str) -> None:
        """Record a phase of no length: nothing happens between its neighbours."""
        self.phases.setdefault(name, PhaseTime())

    def count(self) -> None:
        """One annealing level was sampled in the current phase."""
        self.phases[self._current].steps += 1

    def lap(self) -> None:
        """One annealing level is over."""
        synchronise(self.device)
        now = time.perf_counter()
        self.step_seconds.append(now - self._last_lap)
        self._last_lap = now

    def restart_lap(self) -> None:
        """What was done since the last lap belongs to no level."""
        synchronise(self.device)
        self._last_lap = time.perf_counter()

    def leave(self) -> None:
        """End the current phase, if any."""
        if self._current is None:
            return
        synchronise(self.device)
        self.phases[self._current].seconds += time.perf_counter() - self._started
        self.note_peak(self._current)
        self._current = None

    def note_peak(self, name: str | None = None) -> None:
        """Count the memory since the last phase began as that phase's (None): scores and pictures follow it."""
        if self.device.type != "cuda":
            return
        phase = self.phases[name or list(self.phases)[-1]]
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        phase.peak_vram_mb = max(peak, phase.peak_vram_mb or 0.0)


class ClockHook(Hook):
    """Tells a :class:`PhaseClock` of every level; the last hook of the list."""

    def __init__(self, clock: PhaseClock) -> None:
        self.clock = clock

    def after_mcmc(self, state: State, info: Info) -> State:
        self.clock.count()
        return state

    def before_renoise(self, state: State, info: Info) -> State:
        self.clock.lap()
        return state

    def after_levels(self, state: State, info: Info) -> State:
        self.clock.restart_lap()
        return state


class PhaseHook(Hook):
    """Enters a phase once, at its place in the list of hooks.

    Args:
        clock: the clock.
        name: of the phase.
        level: at whose end it begins; None: after the last level.
    """

    def __init__(self, clock: PhaseClock, name: str, level: int | None) -> None:
        self.clock = clock
        self.name = name
        self.level = level
        self.entered = False

    def before_renoise(self, state: State, info: Info) -> State:
        if state.step == self.level and not self.entered:
            self.entered = True
            self.clock.enter(self.name)
        return state

    def at_end(self, state: State, info: Info) -> State:
        if self.level is None:
            self.clock.enter(self.name)
        return state
