"""Noise schedules: betas of a file, of an option or of a published model, as diffusers describes them."""

from __future__ import annotations

from typing import Any

import torch

from particledaps.diffusion.noise import cosine_betas, linear_betas, scaled_linear_betas
from particledaps.priors.conversion.families import Family
from particledaps.priors.errors import PriorError

COSINE = "squaredcos_cap_v2"
STORED = {"rtol": 1e-5, "atol": 0.0}
"""Files hold betas as float32."""


def betas_of(schedule: dict[str, Any]) -> torch.Tensor:
    """The betas of diffusers' description, float64 ``(T,)``."""
    count, name = schedule["num_train_timesteps"], schedule["beta_schedule"]
    if name == COSINE:
        return cosine_betas(count)
    grid = linear_betas if name == "linear" else scaled_linear_betas
    return grid(count, schedule["beta_start"], schedule["beta_end"])


def published_schedule(family: Family) -> dict[str, Any]:
    """Diffusers' description of a published model's betas."""
    facts = {"num_train_timesteps": 1000, "beta_start": family.beta_start, "beta_end": family.beta_end}
    return facts | {"beta_schedule": family.beta_schedule}


def stored_schedule(family: Family, betas: torch.Tensor) -> dict[str, Any]:
    """Diffusers' description of the betas in a file, with the family's numbers where they are those.

    Raises:
        PriorError: they follow no schedule that diffusers knows.
    """
    values = betas.double().flatten()
    if len(values) < 2 or not (values > 0).all():
        raise PriorError(f"its betas {values[:4].tolist()} are no noise schedule: two or more positive numbers")
    count, ends = len(values), ((family.beta_start, family.beta_end), (values[0].item(), values[-1].item()))
    described = [
        {"num_train_timesteps": count, "beta_start": start, "beta_end": end, "beta_schedule": name}
        for start, end in ends
        for name in ("scaled_linear", "linear")
    ]
    described.append({"num_train_timesteps": count, "beta_schedule": COSINE})
    for schedule in described:
        if torch.allclose(values, betas_of(schedule), **STORED):
            return schedule
    raise PriorError(
        "its betas are linear neither in beta nor in sqrt(beta), nor cosine; diffusers' scheduler cannot describe them"
    )


def same_betas(betas: torch.Tensor, schedule: dict[str, Any]) -> bool:
    """Whether the betas in a file are those of a description."""
    values, wanted = betas.double().flatten(), betas_of(schedule)
    return len(values) == len(wanted) and torch.allclose(values, wanted, **STORED)


def schedule_text(schedule: dict[str, Any]) -> str:
    """One line for people."""
    ends = [f"{schedule['beta_start']:.6g} to {schedule['beta_end']:.6g}"] if "beta_start" in schedule else []
    name = "cosine" if schedule["beta_schedule"] == COSINE else schedule["beta_schedule"]
    return " ".join([name, *ends, f"in {schedule['num_train_timesteps']} steps"])
