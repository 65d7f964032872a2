"""What the hooks leave in the record of an image."""

from typing import Any

from runs.hooks import HookPlan
from state import Info
from symmetry import PARTICLE_COLUMNS


def resampling_record(plan: HookPlan, info: Info) -> dict[str, Any] | None:
    """What resampling did to one image; None if it is off."""
    return {"per_step": info.rows.get("resampling", [])} if plan.keys.resample_sigma > 0 else None


def repulsion_record(plan: HookPlan, info: Info) -> dict[str, Any]:
    """What repulsion did to one image."""
    rows = info.rows.get("repulsion", [])
    return {
        "enabled": plan.space is not None and plan.keys.repulsion_scale > 0,
        "features": None if plan.space is None else plan.space.name,
        "kernel": plan.keys.repulsion_kernel,
        "active_steps": sum(row["scale"] > 0 for row in rows),
        "seconds": sum(row["seconds"] for row in rows),
        "per_step": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
    }


def optimization_record(info: Info, particle_ids: list[int]) -> dict[str, Any] | None:
    """Totals of each particle over all levels, in the order of ``particle_ids``; None if nothing was optimised."""
    rows = info.rows.get("optimization", [])
    if not rows:
        return None
    calls = [[(row, row["particle_ids"].index(p)) for row in rows if p in row["particle_ids"]] for p in particle_ids]

    def of(name: str, call: int) -> list[Any]:
        return [own[call][0][name][own[call][1]] if own else None for own in calls]

    return {
        "particle_ids": particle_ids,
        "iterations": [sum(row["iterations"][i] for row, i in own) for own in calls],
        "seconds": sum(row["seconds"] for row in rows),
        "initial_loss": of("initial_loss", 0),
        "final_loss": of("final_loss", -1),
        "reason": of("reason", -1),
        "accepted": [any(row["accepted"][i] for row, i in own) for own in calls],
        "twins": info.rows.get("twins", []),
        "per_step": [{k: v for k, v in row.items() if k != "seconds"} for row in rows],
    }


def symmetry_record(plan: HookPlan, info: Info) -> dict[str, Any] | None:
    """What each particle tried at each level; None if the moves are off."""
    if not plan.keys.symmetry_moves:
        return None
    rows = info.rows.get("symmetry", [])
    level, particle = ("step", "sigma", "t", "move", "rule"), PARTICLE_COLUMNS
    tries = [
        {n: row[n] for n in level} | {"particle_id": p} | {n: row[n][i] for n in particle}
        for row in rows
        for i, p in enumerate(row["particle_ids"])
    ]
    return {
        "moves": list(plan.keys.symmetry_moves),
        "seconds": sum(row["seconds"] for row in rows),
        "tries": tries,
    }
