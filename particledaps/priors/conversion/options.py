"""What the caller says of a checkpoint that its tensors do not: ``--architecture KEY=VALUE``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from particledaps.priors.conversion.unet_mapping import Heads
from particledaps.priors.errors import PriorError

ORDERS, PREDICTIONS = ("legacy", "new"), ("epsilon", "v_prediction", "sample")
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
"""Name of a noise schedule here -> diffusers' name."""
COUNTS = ("image_size", "num_head_channels", "num_heads", "num_train_timesteps")
BETAS = ("beta_start", "beta_end")
OPTIONS = (
    "image_size",
    "num_head_channels",
    "num_heads",
    "attention_order",
    "beta_schedule",
    *BETAS,
    "num_train_timesteps",
    "prediction_type",
    "null_class",
)


@dataclass(frozen=True)
class Options:
    """Checked options; None where nothing is said.

    Attributes:
        heads: from ``num_head_channels`` or ``num_heads``.
        legacy: order of the rows of ``qkv``.
        image_size: side in pixels.
        schedule: diffusers' description of the betas.
        prediction_type: diffusers' name.
        null_class: index, or ``none``.
    """

    heads: Heads | None
    legacy: bool
    image_size: int | None
    schedule: dict[str, Any] | None
    prediction_type: str | None
    null_class: int | str | None


def read_options(architecture: Mapping[str, Any] | None) -> Options:
    """The options of a mapping, checked.

    Raises:
        PriorError: an unknown key, an impossible value, or values that do not go together.
    """
    given = dict(architecture or {})
    if unknown := sorted(set(given) - set(OPTIONS)):
        raise PriorError(
            f"architecture knows {', '.join(OPTIONS)}, not {', '.join(map(str, unknown))}; the rest is read from shapes"
        )
    _check_values(given)
    order = given.get("attention_order", "legacy")
    return Options(
        heads=_heads(given, order == "legacy"),
        legacy=order == "legacy",
        image_size=given.get("image_size"),
        schedule=_schedule(given),
        prediction_type=given.get("prediction_type"),
        null_class=_null_class(given),
    )


def _check_values(given: dict[str, Any]) -> None:
    order, prediction = given.get("attention_order", "legacy"), given.get("prediction_type", "epsilon")
    if order not in ORDERS:
        raise PriorError(f"attention_order={order} is neither legacy nor new")
    if prediction not in PREDICTIONS:
        raise PriorError(f"prediction_type={prediction} is none of {', '.join(PREDICTIONS)}")
    for key in given.keys() & set(COUNTS):
        if type(given[key]) is not int or given[key] < 1:
            raise PriorError(f"{key}={given[key]} is no positive integer")
    for key in given.keys() & set(BETAS):
        if type(given[key]) not in (int, float) or not 0 < given[key] < 1:
            raise PriorError(f"{key}={given[key]} is no number between 0 and 1")


def _heads(given: dict[str, Any], legacy: bool) -> Heads | None:
    if {"num_head_channels", "num_heads"} <= set(given):
        raise PriorError("num_head_channels and num_heads exclude each other")
    if "num_head_channels" in given:
        return Heads(given["num_head_channels"], 1, legacy)
    return Heads(None, given["num_heads"], legacy) if "num_heads" in given else None


def _schedule(given: dict[str, Any]) -> dict[str, Any] | None:
    said = [key for key in (*BETAS, "num_train_timesteps") if key in given]
    if "beta_schedule" not in given:
        if said:
            raise PriorError(f"{said[0]}={given[said[0]]} needs beta_schedule=linear|scaled_linear|cosine beside it")
        return None
    name, steps = given["beta_schedule"], {"num_train_timesteps": given.get("num_train_timesteps", 1000)}
    diffusers_name = SCHEDULES.get(name, name)
    if diffusers_name not in SCHEDULES.values():
        raise PriorError(f"beta_schedule={name} is none of {', '.join(SCHEDULES)}")
    if steps["num_train_timesteps"] < 2:
        raise PriorError("num_train_timesteps=1 makes no noise schedule: at least 2")
    if diffusers_name == SCHEDULES["cosine"]:
        if any(key in given for key in BETAS):
            raise PriorError(f"beta_schedule={name} takes no beta_start and beta_end")
        return steps | {"beta_schedule": diffusers_name}
    if not all(key in given for key in BETAS):
        raise PriorError(f"beta_schedule={name} needs beta_start=NUMBER and beta_end=NUMBER beside it")
    if given["beta_start"] > given["beta_end"]:
        raise PriorError(f"beta_start={given['beta_start']} is greater than beta_end={given['beta_end']}")
    return steps | {key: float(given[key]) for key in BETAS} | {"beta_schedule": diffusers_name}


def _null_class(given: dict[str, Any]) -> int | str | None:
    value = given.get("null_class", "unsaid")
    if value == "unsaid":
        return None
    if value is None or value == "none":
        return "none"
    if type(value) is not int or value < 0:
        raise PriorError(f"null_class={value} is neither a class (0 or more) nor none")
    return value
