"""Priors and operators of the user's own: found by name, and their mistakes told in one sentence."""

from __future__ import annotations

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from particledaps.checks import SettingsError
from particledaps.priors.errors import PriorError

if TYPE_CHECKING:
    from particledaps.operators.operator import Operator
    from particledaps.priors.prior import Prior


def import_target(key: str, target: str) -> Callable[..., Any]:
    """The callable that ``package.module:factory`` names.

    Raises:
        SettingsError: the module or the attribute does not exist.
    """
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        package = module_name.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        remedy = f"; {package} must lie in the checkout or in a folder of PYTHONPATH" if absent else ""
        reason = f"cannot be imported as package.module:factory ({error}){remedy}"
        raise SettingsError(f"{key}={target}: {reason}") from error


def call_target(key: str, target: str, kind: type, **arguments: Any) -> Any:
    """What the factory ``target`` makes of ``arguments``, an instance of ``kind``.

    Raises:
        SettingsError: it does not exist, does not take these arguments, fails, or returns something else.
    """
    factory = import_target(key, target)
    try:
        inspect.signature(factory).bind(**arguments)
    except ValueError:
        pass  # some builtins tell no signature
    except TypeError as error:
        raise SettingsError(f"{key}={target}: cannot be called with {', '.join(arguments)}: {error}") from error
    try:
        product = factory(**arguments)
    except (SettingsError, PriorError):
        raise
    except ValueError as error:  # its message is meant for the user
        raise SettingsError(f"{key}={target}: {error}") from error
    except Exception as error:  # code of the user's own may fail in any way
        raise SettingsError(f"{key}={target}: {fault(error, getattr(factory, '__module__', None))}") from error
    if not isinstance(product, kind):
        raise SettingsError(
            f"{key}={target} returned {type(product).__name__}, not a {kind.__module__}.{kind.__name__}"
        )
    return product


def check_custom_operator(operator: Operator, image_shape: tuple[int, int, int]) -> None:
    """Apply an operator of the user's own to two empty images before anything is sampled.

    Raises:
        SettingsError: it fails, or its measurement has another shape than it announces.
    """
    if operator.part_name is not None:  # its mask or kernel is not drawn yet
        return
    try:
        wanted = (2, *operator.measurement_shape(image_shape))
        found = tuple(operator(torch.zeros(2, *image_shape)).shape)
    except Exception as error:
        raise SettingsError(f"task={operator.name}: {fault(error, type(operator).__module__)}") from error
    if found != wanted:
        raise SettingsError(
            f"task={operator.name}: the measurement of images {(2, *image_shape)} has the shape {found}, but "
            f"measurement_shape announces {wanted}"
        )


def check_custom_prior(prior: Prior, target: str, count: int, device: torch.device) -> None:
    """Put ``count`` empty latents through a prior of the user's own before anything is sampled.

    Raises:
        SettingsError: it fails, or its images or latents have other shapes than it announces.
    """
    images, latents = (count, *prior.image_shape), (count, *prior.latent_shape)
    try:
        z = torch.zeros(latents, device=device)
        with torch.no_grad():
            denoised, decoded = prior.denoiser(z, torch.ones((), device=device)), prior.decode(z)
        encoded = prior.encode(torch.zeros(images, device=device))
    except Exception as error:
        raise SettingsError(f"model.target={target}: {fault(error, target.partition(':')[0])}") from error
    for name, found, wanted in (
        ("denoiser(z, sigma)", denoised, latents),
        ("decode(z)", decoded, images),
        ("encode(x)", encoded, latents),
    ):
        if tuple(found.shape) != wanted:
            raise SettingsError(f"model.target={target}: {name} has the shape {tuple(found.shape)}, not {wanted}")


def fault(error: Exception, module_name: str | None) -> str:
    """An error in one line, with the line of the module's own file where it came up."""
    file = getattr(sys.modules.get(module_name or ""), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f" ({file}, line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"
