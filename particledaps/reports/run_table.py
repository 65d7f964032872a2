"""The table at the end of a run."""

from __future__ import annotations

import math
from typing import Any

UNEXPLAINED = 3.0
"""A loss of more than so many floors is no fit of a measurement."""


def number(value: float | None, digits: int = 2) -> str:
    """A number for a table, a dash for None."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def magnitude(value: float | None) -> str:
    """A number that may be huge, in at most eight characters; a dash for None."""
    return f"{value:.3e}" if value is not None and abs(value) >= 1e6 else number(value, 1)


def results_table(metrics: dict[str, Any], names: dict[int, str]) -> str:
    """The table at the end of a run: one row an image, then the means.

    ``oracle`` is the best particle by the truth; ``selected`` is chosen without it.
    """
    header = f"{'image':<22}{'oracle':>8}{'mean':>8}{'selected':>10}{'aligned':>9}{'mean':>8}"
    header += f"{'loss':>10}{'floor':>9}  {'modes':<24}{'s':>6}"
    lines = ["PSNR in dB: raw oracle, mean and selected without truth; aligned oracle and mean", header]
    rows = zip(metrics["measurement"]["per_image"], metrics["timing"]["per_image_seconds"], strict=True)
    for position, (measured, seconds) in enumerate(rows):
        quality = [""] * 5
        labels = "-"
        if metrics["psnr"] is not None:
            raw = metrics["psnr"]["per_image"][position]
            aligned = metrics["psnr_aligned"]["per_image"][position]
            quality = [raw["best"], raw["mean"], raw["selected"], aligned["best"], aligned["mean"]]
            labels = ",".join(metrics["modes"]["per_image"][position]["labels"])
        a, b, c, d, e = (number(q) if q != "" else "-" for q in quality)
        loss = magnitude(min(measured["loss"], default=None))
        name = names.get(measured["image_id"], str(measured["image_id"]))[:21]
        floor = magnitude(measured["noise_floor"])
        lines.append(f"{name:<22}{a:>8}{b:>8}{c:>10}{d:>9}{e:>8}{loss:>10}{floor:>9}  {labels:<24}{seconds:>6.0f}")
    if metrics["psnr"] is not None:
        raw, aligned = metrics["psnr"]["overall"], metrics["psnr_aligned"]["overall"]
        a, b, c = (number(raw[k]) for k in ("best_mean", "mean_of_means", "selected_mean"))
        d, e = (number(aligned[k]) for k in ("best_mean", "mean_of_means"))
        lines.append(f"{'mean':<22}{a:>8}{b:>8}{c:>10}{d:>9}{e:>8}")
    return "\n".join(lines + unexplained_lines(metrics, names) + agreement_lines(metrics, names))


def unexplained_lines(metrics: dict[str, Any], names: dict[int, str]) -> list[str]:
    """Images whose measurement no particle explains, though a loss near the floor was to be expected."""
    found = []
    for row in metrics["measurement"]["per_image"]:
        loss, floor = min(row["loss"], default=None), row["noise_floor"]
        if loss is not None and floor is not None and loss > UNEXPLAINED * floor:
            name = names.get(row["image_id"], str(row["image_id"]))
            found.append(f"{name} (loss {magnitude(loss).strip()}, {loss / floor:.0f} floors)")
    if not found:
        return []
    return [
        f"not explained: {', '.join(found)}: is the measurement in the convention that the task expects, "
        "and has the sampler enough steps?"
    ]


def agreement_lines(metrics: dict[str, Any], names: dict[int, str]) -> list[str]:
    """In how many images two lineages of restarts agreed, and in which not; nothing where nobody asked."""
    ends = {row["image_id"]: row["end"] for row in (metrics["restarts"] or {"per_image": []})["per_image"]}
    asked = {image_id: end["agreed"] for image_id, end in ends.items() if end and end["agreed"] is not None}
    if not asked:
        return []
    doubtful = [names.get(image_id, str(image_id)) for image_id, agreed in asked.items() if not agreed]
    lines = [f"two lineages agreed in {len(asked) - len(doubtful)} of {len(asked)} images"]
    return lines + ([f"no two agreed in: {', '.join(doubtful)}"] if doubtful else [])
