"""Measurements with gaps: entries of ``y`` that were not measured take part in no sum.

A gap is NaN in ``y``. :func:`leave_out` makes of an operator and such a ``y`` one that knows the gaps and a ``y`` that
is finite; :func:`with_gaps` gives the NaN back, for files and pictures.
"""

from __future__ import annotations

from functools import cache

import torch

from particledaps.operators.inpainting import Inpainting
from particledaps.operators.measured_phase_retrieval import MeasuredPhaseRetrieval
from particledaps.operators.operator import NoiseFloor, Objective, Operator, Symmetry
from particledaps.operators.phase_retrieval import PhaseRetrieval


def leave_out(operator: Operator, y: torch.Tensor) -> tuple[Operator, torch.Tensor]:
    """The operator of the entries of one measurement ``y`` ``(C, ...)`` that are not NaN, and a finite ``y`` for it.

    Without NaN both are what they were.
    """
    measured = ~y.isnan()
    if bool(measured.all()):
        return operator, y
    if type(operator) is PhaseRetrieval:
        own = MeasuredPhaseRetrieval(operator, measured)
        return own, own.fill(y)
    kind = MeasuredInpainting if isinstance(operator, Inpainting) else MeasuredPart
    return kind(operator, measured), torch.where(measured, y, 0)


def with_gaps(operator: Operator, y: torch.Tensor) -> torch.Tensor:
    """Measurements ``(..., C, H, W)`` with NaN where ``operator`` leaves entries out."""
    if not isinstance(operator, MeasuredPart | MeasuredPhaseRetrieval):
        return y
    return torch.where(operator.measured.to(y.device), y, torch.nan)


class MeasuredPart(Operator):
    r"""Any operator, with the entries of ``y`` that were measured alone: ``L = sum_measured (A(x) - y)^2``.

    A gap is filled with what the image itself would give, :math:`y' = m y + (1 - m) A(x)`. Its residual is 0, so loss
    and gradient of the operator's own, closed form or not, are those of the measured entries.

    Args:
        operator: bound to its image.
        measured: shaped like one measurement, True where an entry was measured.

    Raises:
        ValueError: nothing was measured.
    """

    def __init__(self, operator: Operator, measured: torch.Tensor) -> None:
        self.operator, self.measured = operator, measured.bool()
        self.count = int(self.measured.sum())
        if self.count == 0:
            raise ValueError(f"{operator.name}: no entry of the measurement was measured")
        self.name = operator.name
        self.noise_sigma = operator.noise_sigma
        self.linear = operator.linear
        self.image_like = operator.image_like
        self.part_name = operator.part_name
        self.part = operator.part
        self.per_image = operator.per_image
        self._seen = cache(self.measured.to)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.operator(x)

    def for_image(self, image_shape: tuple[int, int, int], generator: torch.Generator) -> MeasuredPart:
        return type(self)(self.operator.for_image(image_shape, generator), self.measured)

    def with_part(self, part: torch.Tensor) -> MeasuredPart:
        return type(self)(self.operator.with_part(part), self.measured)

    def with_noise(self, noise_sigma: float) -> MeasuredPart:
        return type(self)(self.operator.with_noise(noise_sigma), self.measured)

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        return self.operator.measurement_shape(image_shape)

    def picture(self, y: torch.Tensor) -> torch.Tensor | None:
        return self.operator.picture(y)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.operator.loss(x, self._filled(x, y))

    def objective(self, y: torch.Tensor) -> Objective:
        def evaluate(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.operator.objective(self._filled(x, y))(x)

        return evaluate

    def high_snr_loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.operator.high_snr_loss(x, self._filled(x, y))

    def noise_floor(self, y: torch.Tensor) -> NoiseFloor:
        r""":math:`n \sigma^2 \pm \sigma^2 \sqrt{2 n}` with ``n`` measured entries."""
        mean = y.new_full((len(y),), self.count * self.noise_sigma**2)
        return NoiseFloor(mean, mean * (2 / self.count) ** 0.5)

    def symmetries(self) -> tuple[Symmetry, ...]:
        """Those of the operator: all of ``A(x)`` stays, so its measured part does."""
        return self.operator.symmetries()

    def channel_symmetries(self, channels: int) -> tuple[Symmetry, ...]:
        return self.operator.channel_symmetries(channels)

    def _filled(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.where(self._seen(y.device), y, self.operator(x))


class MeasuredInpainting(MeasuredPart):
    """Inpainting of which some entries were not even read, whether their pixels are seen or not."""

    operator: Inpainting

    def noise_floor(self, y: torch.Tensor) -> NoiseFloor:
        r""":math:`n_{seen} \sigma^2 + \sum_{unseen} y^2 \pm \sigma^2 \sqrt{2 n_{seen}}` over measured entries."""
        count = (self.operator.mask(y) * self._seen(y.device)).sum()
        mean = count * self.noise_sigma**2 + self._unseen(y).square().flatten(1).sum(1)
        return NoiseFloor(mean, torch.full_like(mean, self.noise_sigma**2) * (2 * count).sqrt())

    def pseudo_inverse(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        """``m y``: pixels that were not seen or not measured are mid-grey."""
        return self.operator.pseudo_inverse(y * self._seen(y.device), image_shape)

    def estimated_noise_sigma(self, y: torch.Tensor) -> torch.Tensor | None:
        """Root mean square of the measured entries of unseen pixels, ``(B,)``; None where they hold nothing."""
        unseen = self._unseen(y).flatten(1)
        if bool((unseen == 0).all()):
            return None
        return (unseen.square().sum(1) / self._unseen(torch.ones_like(y[:1])).sum()).sqrt()

    def _unseen(self, y: torch.Tensor) -> torch.Tensor:
        return y * (1 - self.operator.mask(y)) * self._seen(y.device)
