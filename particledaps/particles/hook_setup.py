"""What a hook is built for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from particledaps.checks import SettingsError
from particledaps.particles.state import NUM_TIMESTEPS

if TYPE_CHECKING:
    import torch

    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior
    from particledaps.settings.hook_keys import HooksAsked


NEEDED_SYMMETRY = "rotate_180"


def need_flip(operator: Operator, asked: str, instead: str) -> None:
    """Refuse what turns images by 180 degrees where the operator would notice.

    Raises:
        SettingsError: it would.
    """
    if NEEDED_SYMMETRY not in [s.name for s in operator.symmetries()]:
        raise SettingsError(
            f"{asked}: the 180-degree flip is no symmetry of the operator {operator.name}; use {instead}"
        )


def level_of(step: float, num_levels: int) -> int | None:
    """The first level k of K with ``t = 1000 (1 - k / K) <= step``, compared in integers; None if off or never."""
    if step < 0:
        return None
    return next((k for k in range(num_levels) if NUM_TIMESTEPS * (num_levels - k) <= step * num_levels), None)


@dataclass(frozen=True)
class Setup:
    """The run, or the image of a run, that a hook is built for.

    Attributes:
        prior: the prior.
        operator: of the image, with its mask or kernel; of the task where no image is at hand yet.
        path: annealing sigmas ``(K + 1,)``.
        asked: the settings of all hooks.
        device: where the run computes.
        first_level: the earliest level that runs.
    """

    prior: Prior
    operator: Operator
    path: torch.Tensor
    asked: HooksAsked
    device: torch.device
    first_level: int = 0

    @property
    def num_levels(self) -> int:
        """Number K of levels."""
        return len(self.path) - 1

    def level_at(self, step: float) -> int | None:
        """See :func:`level_of`."""
        return level_of(step, self.num_levels)
