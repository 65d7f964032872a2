"""The operators that ``task.kind`` names, the checks of ``task.options``, and the operator of each image."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import numpy as np
import torch

from particledaps.checkout import ROOT
from particledaps.checks import Checks, DataError, SettingsError
from particledaps.data.given_arrays import open_arrays
from particledaps.operators.down_sampling import DownSampling
from particledaps.operators.gaussian_blur import GaussianBlur
from particledaps.operators.hdr import HighDynamicRange
from particledaps.operators.inpainting import BoxInpainting, RandomInpainting
from particledaps.operators.motion_blur import MotionBlur
from particledaps.operators.nonlinear_blur import NonlinearBlur
from particledaps.operators.phase_retrieval import PhaseRetrieval
from particledaps.priors.cards import refuse_known_file
from particledaps.priors.errors import PriorError
from particledaps.streams import operator_generator

if TYPE_CHECKING:
    from particledaps.operators.blur_network import BlurNetwork
    from particledaps.operators.operator import Operator

ENCODER = "kernel_extractor."
CODE_SCALE = 1.2


def nonlinear_blur(
    weights: str = "checkpoints/GOPRO_wVAE.pth", seed: int = 0, noise_sigma: float = 0.05
) -> NonlinearBlur:
    """Nonlinear blur with the published network; the code is DAPS's, 1.2 times NumPy's normal numbers of ``seed``.

    Args:
        weights: the file; relative paths start at the checkout.
        seed: of the code.
        noise_sigma: see :class:`NonlinearBlur`.

    Raises:
        ValueError: a value is out of range.
        SettingsError: the file is missing, damaged or of another network.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: must be at least 0 and below 2^32")
    network = load_blur_network(ROOT / weights)
    code = CODE_SCALE * np.random.RandomState(seed).randn(1, network.code_channels, 2, 2)
    return NonlinearBlur(network, torch.from_numpy(code).float(), noise_sigma)


OPERATORS: dict[str, Callable[..., Operator]] = {
    "phase_retrieval": PhaseRetrieval,
    "down_sampling": DownSampling,
    "inpainting": BoxInpainting,
    "inpainting_rand": RandomInpainting,
    "gaussian_blur": GaussianBlur,
    "motion_blur": MotionBlur,
    "nonlinear_blur": nonlinear_blur,
    "hdr": HighDynamicRange,
}
"""Factories by ``task.kind``; their parameters are the names, types and defaults of ``task.options``."""

RESERVED = {"phase_retrieval": ("oversample",)}
"""Parameters that have keys of their own under ``task`` (``noise_sigma`` has one for every kind)."""


def load_blur_network(path: Path) -> BlurNetwork:
    """The network of nonlinear blur from the published file (weights only; its encoder is left out).

    Raises:
        SettingsError: the file is missing, damaged or of another network.
    """
    key = f"task.options.weights={path}"
    if not path.is_file():
        raise SettingsError(
            f"{key}: no such file; nonlinear blur needs the published network GOPRO_wVAE.pth: "
            "bash download.sh nonlinear-blur"
        )
    try:
        refuse_known_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PriorError as error:
        raise SettingsError(f"{key}: {error}") from error
    except Exception as error:  # torch.load raises whatever its readers raise
        first = str(error).splitlines()[0][:160]
        raise SettingsError(f"{key}: not a readable file of weights (truncated download?): {first}") from error
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise SettingsError(f"{key}: holds no plain dictionary of tensors")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith(ENCODER)}
    try:
        from particledaps.operators.blur_network import BlurNetwork

        network = BlurNetwork(*_blur_network_size(state))
        network.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as error:
        first = " ".join(str(error).split()[:24])  # the whole list can name hundreds of tensors
        raise SettingsError(f"{key}: not the network of nonlinear blur: {first}") from error
    return network


def _blur_network_size(state: Mapping[str, torch.Tensor]) -> tuple[int, int, int, int]:
    first, second = (sum(k.startswith(p) and k.endswith("conv1.weight") for k in state) for p in ("feature", "recon"))
    width = state[f"recon_trunk.{second + 6}.weight"].shape[1]
    return len(state["feature_extractor.0.weight"]), first, second, width


def option_types(kind: str) -> dict[str, Any]:
    """Names and types of the keys of ``task.options`` for one kind of operator."""
    factory = OPERATORS[kind]
    hints = get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    own = ("return", "noise_sigma", *RESERVED.get(kind, ()))
    return {name: hint for name, hint in hints.items() if name not in own}


def check_options(kind: str, options: Mapping[str, Any], arguments: Mapping[str, Any], checks: Checks) -> None:
    """Check ``task.options`` of one of the kinds above: names, types, and what the operator itself demands.

    Args:
        kind: of the operator.
        options: ``task.options``.
        arguments: its further arguments, which have keys of their own.
        checks: collects the problems.
    """
    types, before = option_types(kind), len(checks.problems)
    for name, value in options.items():
        if name not in types:
            known = f"{kind} takes {', '.join(types)}" if types else f"{kind} takes none"
            checks.require(False, f"task.options.{name}: unknown key; {known}")
        elif not _fits(value, types[name]):
            wanted = " or ".join(_type_name(t) for t in _alternatives(types[name]))
            checks.require(False, f"task.options.{name}={value}: must be {wanted}")
    if len(checks.problems) > before or OPERATORS[kind] is nonlinear_blur:  # the latter reads a file first
        return
    try:
        OPERATORS[kind](**options, **arguments)
    except ValueError as error:
        reserved = ("noise_sigma", *RESERVED.get(kind, ()))
        if not str(error).startswith(reserved):  # those were reported by their own keys
            checks.require(False, f"task.options.{error}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) or (hint,)


def _fits(value: Any, hint: Any) -> bool:
    allowed = _alternatives(hint)
    if isinstance(value, bool):
        return bool in allowed
    return isinstance(value, allowed) or (isinstance(value, int) and float in allowed)


def _type_name(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "null")


def measurement_shape(operator: Operator, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    """Shape of the measurement of one image.

    Raises:
        SettingsError: the operator cannot be applied to images of this shape.
    """
    try:
        return operator.measurement_shape(image_shape)
    except ValueError as error:
        raise _refusal(operator, error) from error


def _refusal(operator: Operator, error: ValueError) -> SettingsError:
    own = option_types(operator.name) if operator.name in OPERATORS else ()
    named = str(error).split("=")[0] in own
    return SettingsError(f"task.options.{error}" if named else f"task={operator.name}: {error}")


def operator_of_image(operator: Operator, seed: int, image_id: int, image_shape: tuple[int, int, int]) -> Operator:
    """``operator`` with its random part drawn for one image, or for all images where it is shared.

    Args:
        operator: as the configuration describes it.
        seed: the run's seed.
        image_id: id of the image in its data set.
        image_shape: ``(C, H, W)``.

    Raises:
        SettingsError: the operator cannot be applied to images of this shape.
    """
    generator = operator_generator(seed, image_id if operator.per_image else None)
    try:
        return operator.for_image(image_shape, generator)
    except ValueError as error:
        raise _refusal(operator, error) from error


def operators_of_measurements(
    operator: Operator, path: Path, ids: tuple[int, ...], image_shape: tuple[int, int, int]
) -> list[Operator]:
    """The operators of given measurements; masks or kernels come from the file, beside ``y``.

    Args:
        operator: as the configuration describes it.
        path: see :func:`particledaps.data.measurements.load_measurements`; for a random operator with the array
            ``mask`` or ``kernel``: one for all measurements, or one each.
        ids: the measurements to reconstruct.
        image_shape: ``(C, H, W)``.

    Raises:
        DataError: the array is missing or does not fit.
    """
    name = operator.part_name
    if name is None:
        return [operator] * len(ids)
    one_shape = measurement_shape(operator, image_shape)
    with open_arrays(path, one_shape) as archive:
        if name not in archive.files:
            raise DataError(
                f"{path} has no array '{name}': a measurement of {operator.name} needs the {name} that was used, "
                f"({', '.join(('H', 'W') if name == 'mask' else ('k', 'k'))}) or one for each measurement"
            )
        (shape, dtype), given = archive.header(name), archive.header("y")[0]
        count = 1 if len(given) == len(one_shape) else given[0]
        if dtype.kind not in "biuf" or len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] not in (1, count)):
            raise DataError(f"{path}: {name} is {dtype} {shape}, expected one for all or for each of {count}")
        order = archive.read("image_ids").tolist() if "image_ids" in archive.files else range(count)
        rows = {image_id: row for row, image_id in enumerate(order)}
        one_for_all = len(shape) == 2 or shape[0] == 1
        wanted = None if one_for_all else sorted(rows[i] for i in ids)
        parts = archive.read(name, wanted).reshape(-1, *shape[-2:])
    place = {i: 0 if wanted is None else wanted.index(rows[i]) for i in ids}
    try:
        bound = [operator.with_part(torch.from_numpy(parts[place[i]].astype(np.float32))) for i in ids]
        for one in bound:
            one.measurement_shape(image_shape)
            one(torch.zeros(1, *image_shape))
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return bound
