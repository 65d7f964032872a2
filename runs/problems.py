"""What a run is to reconstruct: given measurements, or measurements simulated from images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from operators.operator import Operator
from priors.cards import sha256_of
from priors.prior import Prior
from runs.checks import DataError
from runs.custom import check_custom_operator
from runs.image_folder import assign_ids, image_files
from runs.images import load_images
from runs.measurements import centred_amplitudes, check_magnitude, file_convention, load_measurements
from runs.operators import measurement_shape, operator_of_image, operators_of_measurements
from runs.record import RunFolder
from runs.result import Problem
from runs.rng import measurement_generator
from runs.settings import DataSettings, RunSettings
from runs.sources import Source, arrays_sha256

NOISE_TOLERANCE = 0.1
SumsOf = Callable[[Sequence[int]], dict[int, str]]


def load_problems(
    settings: RunSettings, prior: Prior, operator: Operator, device: torch.device, ids: dict[str, int] | None
) -> list[Problem]:
    """The measurements of this run: given ones, or simulated from images.

    Args:
        settings: data and task.
        prior: whose images are measured.
        operator: that measures them.
        device: where measurements go.
        ids: of the files of a folder, see :func:`folder_ids`; else None.

    Raises:
        SettingsError, DataError: the operator or the data cannot be used.
    """
    if settings.task.kind == "custom":
        check_custom_operator(operator, prior.image_shape)
    if settings.data.measurement is not None:
        return _given(settings, prior, operator, device)
    images = load_images(settings.data, prior.image_shape, ids)
    problems = []
    each = zip(images.pixels, images.ids, images.names, images.origins, images.sources, strict=True)
    for x, image_id, name, origin, source in each:
        truth = x[None]
        own = operator_of_image(operator, settings.seed, image_id, prior.image_shape)
        y = own.measure(truth, measurement_generator(settings.seed, image_id))
        problems.append(Problem(image_id, name, origin, own, y.to(device), truth.to(device), source))
    return problems


def _given(settings: RunSettings, prior: Prior, operator: Operator, device: torch.device) -> list[Problem]:
    path, problems = Path(settings.data.measurement), []
    convention = file_convention(path, settings.task) if settings.task.kind == "phase_retrieval" else None
    for image_id, y, own, source in _read_given(settings, prior, operator):
        if convention is not None:
            y = centred_amplitudes(y, image_id, convention, prior.image_shape, settings.task)
        check_magnitude(own, y[None], image_id, prior.image_shape)
        problems.append(Problem(image_id, source.name, "measured", own, y[None].to(device), None, source))
    return problems


def _read_given(
    settings: RunSettings, prior: Prior, operator: Operator
) -> Iterator[tuple[int, torch.Tensor, Operator, Source]]:
    """Id, values as they stand in the file, operator and source of each measurement."""
    data, path = settings.data, Path(settings.data.measurement)
    shape = measurement_shape(operator, prior.image_shape)
    values, ids = load_measurements(path, shape, data.start_id, data.end_id)
    operators = operators_of_measurements(operator, path, ids, prior.image_shape)
    for image_id, y, own in zip(ids, values, operators, strict=True):
        part = None if own.part is None else own.part.numpy()
        yield image_id, y, own, Source(f"measurement_{image_id:05d}", arrays_sha256(y.numpy(), part))


def sums_now(settings: RunSettings, prior: Prior, operator: Operator, ids: dict[str, int] | None) -> SumsOf:
    """A function from image ids to the checksums of their inputs as they are now, for those that there are."""
    data = settings.data

    def of(wanted: Sequence[int]) -> dict[int, str]:
        if ids is not None:
            root = Path(data.dir)
            return {i: sha256_of(root / name) for name, i in ids.items() if i in wanted}
        span = replace(data, start_id=min(wanted), end_id=max(wanted) + 1)
        try:
            if data.measurement is not None:
                found = _read_given(replace(settings, data=span), prior, operator)
                return {i: source.sha256 for i, _, _, source in found}
            images = load_images(span, prior.image_shape)
            return {i: s.sha256 for i, s in zip(images.ids, images.sources, strict=True)}
        except DataError:  # what is gone has no checksum
            return {}

    return of


def folder_ids(data: DataSettings, folder: RunFolder) -> dict[str, int] | None:
    """Ids of the images of ``data.dir`` by their paths below it, as this run knows them; None for other data.

    Raises:
        DataError: there is no image.
    """
    if data.measurement is not None or data.kind != "folder":
        return None
    root = Path(data.dir)
    files = image_files(root, [folder.path])
    names = [path.relative_to(root).as_posix() for path in files]
    return assign_ids(root, files, folder.known_files(names))


def noise_warnings(problems: Sequence[Problem]) -> list[str]:
    """Which measurements reveal another noise level than the configured one."""
    lines = []
    for problem in problems:
        operator = problem.operator
        found = operator.estimated_noise_sigma(problem.y)
        if found is not None and abs(found.item() / operator.noise_sigma - 1) > NOISE_TOLERANCE:
            lines.append(
                f"{problem.name}: the measurement's noise looks like {found.item():.3g}, but task.noise_sigma is "
                f"{operator.noise_sigma:g}; the noise floor will be off"
            )
    return lines
