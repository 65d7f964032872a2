"""What a run is to reconstruct: given measurements, or measurements simulated from images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from particledaps.checks import DataError
from particledaps.checksums import sha256_of
from particledaps.data.image_set import ImageSet
from particledaps.data.image_sets import load_images
from particledaps.data.measurements import (
    centred_amplitudes,
    check_entries,
    check_magnitude,
    file_convention,
    gaps_told,
    load_measurements,
    unread_arrays,
    with_its_noise,
)
from particledaps.data.sources import Source, arrays_sha256
from particledaps.operators.measured import leave_out
from particledaps.operators.operator import Operator
from particledaps.priors.prior import Prior
from particledaps.runs.pending import Pending
from particledaps.runs.result import Problem
from particledaps.settings.custom import check_custom_operator
from particledaps.settings.schema import AUTO, DataSettings, TaskSettings
from particledaps.settings.tasks import measurement_shape, operator_of_image, operators_of_measurements
from particledaps.streams import measurement_generator

T = TypeVar("T")
NOISE_TOLERANCE = 0.1


@dataclass(frozen=True)
class Inputs:
    """Where the measurements of a run come from.

    Attributes:
        data: images, or a file of measurements.
        task: what such a file holds.
        seed: of simulated measurements.
        prior: whose images are measured.
        operator: that measures them.
        ids: of the files of a folder, see :func:`particledaps.runs.resume.folder_ids`; else None.
    """

    data: DataSettings
    task: TaskSettings
    seed: int
    prior: Prior
    operator: Operator
    ids: dict[str, int] | None

    def find(self, on_error: str) -> list[Pending]:
        """The measurements of this run: given ones, or simulated from images.

        Args:
            on_error: ``continue`` if something can be read, ``stop`` if all of it must be readable.

        Raises:
            SettingsError, DataError: the operator or the data cannot be used.
        """
        if self.task.kind == "custom":
            check_custom_operator(self.operator, self.prior.image_shape)
        if self.data.measurement is not None:
            found = self._given()
        else:
            measurement_shape(self.operator, self.prior.image_shape)
            images = load_images(self.data, self.prior.image_shape, self.ids)
            found = [self._simulated(images, k) for k in range(len(images))]
        _check_some(found, on_error)
        return found

    def sums_now(self, wanted: Sequence[int]) -> dict[int, str]:
        """Checksums of the inputs of image ids as they are now, for those that there are."""
        if self.ids is not None:
            root = Path(self.data.dir)
            return {i: sha256_of(root / name) for name, i in self.ids.items() if i in wanted}
        span = replace(self.data, start_id=min(wanted), end_id=max(wanted) + 1)
        try:
            if self.data.measurement is not None:
                return {i: source.sha256 for i, _, _, source in replace(self, data=span)._read_given()}
            images = load_images(span, self.prior.image_shape)
            return {i: images.source(k).sha256 for k, i in enumerate(images.ids) if i in wanted}
        except DataError:  # what is gone has no checksum
            return {}

    def _simulated(self, images: ImageSet, position: int) -> Pending:
        image_id = images.ids[position]
        name = images.names[position]
        origin = images.origins[position]

        def load() -> Problem:
            truth = images.image(position)
            own = operator_of_image(self.operator, self.seed, image_id, self.prior.image_shape)
            y = own.measure(truth, measurement_generator(self.seed, image_id))
            return Problem(image_id, name, origin, own, y, truth, images.source(position))

        return Pending(image_id, name, lambda: images.source(position), load)

    def _given(self) -> list[Pending]:
        """Measurements of a file; one that no image can have, or that holds nothing, is found when it is its turn."""
        path = Path(self.data.measurement)
        task = self.task
        operator = self.operator
        shape = measurement_shape(operator, self.prior.image_shape)
        convention = file_convention(path, shape, task) if task.kind == "phase_retrieval" else None
        rows = list(self._read_given())

        def load(image_id: int, y: torch.Tensor, own: Operator, source: Source) -> Problem:
            check_entries(path, image_id, y)
            if convention is not None:
                y = centred_amplitudes(y, image_id, convention, self.prior.image_shape, task)
            bound, y = leave_out(own, y)
            noise = "given"
            if task.noise_sigma == AUTO:
                bound, noise = with_its_noise(bound, y[None])
            check_magnitude(bound, y[None], image_id, self.prior.image_shape)
            return Problem(image_id, source.name, "measured", bound, y[None], None, source, noise)

        left_out = [int(y.isnan().sum()) for _, y, _, _ in rows]
        told = gaps_told(path, left_out, sum(y.numel() for _, y, _, _ in rows), operator.part_name)
        for line in told + unread_arrays(path, shape, operator.part_name):
            print(line)
        return [Pending(row[0], row[3].name, partial(_itself, row[3]), partial(load, *row)) for row in rows]

    def _read_given(self) -> Iterator[tuple[int, torch.Tensor, Operator, Source]]:
        """Id, values as they stand in the file (NaN: not measured), operator and source of each measurement."""
        data = self.data
        path = Path(self.data.measurement)
        operator = self.operator
        shape = measurement_shape(operator, self.prior.image_shape)
        values, ids = load_measurements(path, shape, data.start_id, data.end_id, operator.part_name)
        operators = operators_of_measurements(operator, path, ids, self.prior.image_shape)
        for image_id, y, own in zip(ids, values, operators, strict=True):
            part = None if own.part is None else own.part.numpy()
            yield image_id, y, own, Source(f"measurement_{image_id:05d}", arrays_sha256(y.numpy(), part))


def _itself(value: T) -> T:
    return value


def _check_some(found: Sequence[Pending], on_error: str) -> None:
    """Something can be read, or with ``stop`` everything can, before any work begins.

    Raises:
        DataError: of the first input.
    """
    first: DataError | None = None
    for pending in found:
        try:
            pending.load(keep=first is None and on_error == "continue")
        except DataError as error:
            first = first or error
            if on_error == "stop":
                raise
            continue
        if on_error == "continue":
            return
    if first is not None:
        rest = f" (and none of the {len(found) - 1} others can be read)" if len(found) > 1 else ""
        raise DataError(f"{first}{rest}")


def noise_line(problem: Problem) -> str | None:
    """What a measurement shows of its noise, where that is what counts, or not what the configuration says."""
    operator = problem.operator
    if problem.noise == "shown":
        return f"{problem.title}: noise_sigma={operator.noise_sigma:.3g}, as the measurement shows it"
    if problem.noise == "effective":
        return (
            f"{problem.title}: noise_sigma={operator.noise_sigma:.3g}, effective: what the prior's decoder cannot say "
            "counts as noise"
        )
    found = operator.estimated_noise_sigma(problem.y)
    if found is None or abs(found.item() / operator.noise_sigma - 1) <= NOISE_TOLERANCE:
        return None
    return (
        f"{problem.title}: the measurement's noise looks like {found.item():.3g}, but task.noise_sigma is "
        f"{operator.noise_sigma:g}; the noise floor will be off"
    )
