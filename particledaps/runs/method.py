"""What one image's reconstruction needs of a way to sample; :class:`plan.Plan` is the one that ships."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.particles.state import Hook, Info, Start, State
    from particledaps.priors.prior import Prior
    from particledaps.runs.clock import PhaseClock
    from particledaps.streams import ParticleStreams


class Sampler(Protocol):
    """Samples the particles of one measurement."""

    def sample(
        self,
        y: torch.Tensor,
        streams: ParticleStreams,
        particle_ids: Sequence[int],
        info: Info | None = None,
        start: Start | None = None,
    ) -> State:
        """The last state; the answers are its ``z0_y``. See :meth:`sampler.LatentDAPS.sample`."""
        ...


class Method(Protocol):
    """Makes the sampler of each image, and says what it did.

    Attributes:
        prior: decodes what was sampled.
        num_levels: of the loop.
        phases: names of the parts of a run that are timed apart, in order.
        tau: standard deviation of the chain's likelihood, for the record.
        selection_tau: of the likelihood where the answer is chosen beside the prior.
    """

    @property
    def prior(self) -> Prior: ...
    @property
    def num_levels(self) -> int: ...
    @property
    def phases(self) -> list[str]: ...
    @property
    def tau(self) -> float: ...
    @property
    def selection_tau(self) -> float: ...

    def with_prior(self, prior: Prior) -> Method:
        """The same for the same prior with another ``decode_batch``."""
        ...

    def for_operator(self, operator: Operator) -> Method:
        """The same for an image with an operator of its own."""
        ...

    def first_state(
        self, y: torch.Tensor, streams: ParticleStreams, particle_ids: list[int]
    ) -> tuple[Start | None, dict[str, Any] | None]:
        """Where the particles begin (None: as pure noise), and what the record says of it."""
        ...

    def sampler(self, clock: PhaseClock, watchers: Sequence[Hook]) -> Sampler:
        """The sampler of one image; it tells ``watchers`` of every level and ``clock`` of every phase."""
        ...

    def record(self, info: Info, particle_ids: list[int]) -> dict[str, Any]:
        """What was done to one image beside sampling, by the names of ``metrics.json``."""
        ...

    def why_diverged(self, y: torch.Tensor, count: int) -> str:
        """The likely reason why all ``count`` particles became non-finite, and what to do."""
        ...
