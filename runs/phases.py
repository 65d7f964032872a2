"""Seconds and peak GPU memory of each phase of a run."""

import time
from dataclasses import dataclass, field

import torch


def synchronise(device: torch.device) -> None:
    """Wait for queued kernels, so that a clock reads what was done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Phase:
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
    phases: dict[str, Phase] = field(default_factory=dict)
    step_seconds: list[float] = field(default_factory=list)
    _current: str | None = None
    _started: float = 0.0
    _last_step: float = 0.0

    def enter(self, name: str) -> None:
        """Leave the current phase and start ``name``."""
        self.leave()
        self.phases.setdefault(name, Phase())
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._current, self._started = name, time.perf_counter()
        self._last_step = self._started

    def step(self) -> None:
        """One annealing level of the current phase is done."""
        synchronise(self.device)
        now = time.perf_counter()
        self.step_seconds.append(now - self._last_step)
        self._last_step = now
        self.phases[self._current].steps += 1

    def leave(self) -> None:
        """End the current phase, if any."""
        if self._current is None:
            return
        synchronise(self.device)
        phase = self.phases[self._current]
        phase.seconds += time.perf_counter() - self._started
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
            phase.peak_vram_mb = max(peak, phase.peak_vram_mb or 0.0)
        self._current = None
