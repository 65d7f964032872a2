"""The pictures of one reconstruction: single images, contact sheet, trajectory, lineage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from particledaps.evaluation.modes import agreement_db
from particledaps.names import shown
from particledaps.operators.measured import with_gaps
from particledaps.reports.pictures import (
    Snapshot,
    contact_sheet,
    lineage_figure,
    measurement_picture,
    save_png,
    trajectory_figure,
)
from particledaps.runs.result import Problem, Result

AGREEMENT = {None: "", True: ": two lineages agreed", False: ": no two lineages agreed"}


def draw_result(
    folder: Path,
    result: Result,
    levels: list[Snapshot],
    line: list[tuple[int, torch.Tensor]],
    moves: list[dict[str, Any]],
) -> list[Path]:
    """Write all pictures of one result into the run's subfolders; returns their paths.

    Args:
        folder: of the run.
        result: what to show.
        levels: of the trajectory; empty for no figure.
        line: ids and images ``(C, H, W)`` of the answer's ancestors and the answer; drawn if there are ancestors.
        moves: rows of the symmetry moves (:class:`symmetry.SymmetryMoves`); the accepted ones are marked.
    """
    name = f"{result.problem.image_id:05d}"
    written = []

    def place(sub: str, end: str) -> Path:
        written.append(folder / sub / f"{name}{end}.png")
        return written[-1]

    for particle, image in zip(result.particle_ids, result.images, strict=True):
        save_png(place("samples", f"_particle{particle}"), image)
    if result.selection is not None:
        save_png(place("samples", "_selected"), answer(result))
    heading = f"{shown(result.problem.name)} ({result.problem.origin}), image {result.problem.image_id}"
    heading += AGREEMENT[result.agreed]
    contact_sheet(place("sheets", ""), [sheet_tiles(result)], heading)
    if levels:
        trajectory_figure(place("trajectory", ""), levels, accepted_moves(moves))
    if len(line) > 1:
        titled = [(image.clamp(-1, 1), ancestor_title(result.problem, i, image)) for i, image in line]
        lineage_figure(place("trajectory", "_lineage"), titled, result.problem.truth)
    return written


def accepted_moves(rows: list[dict[str, Any]]) -> dict[tuple[int, int], str]:
    """Names of the moves that were made, by step and particle id."""
    made: dict[tuple[int, int], list[str]] = {}
    for row in rows:
        for particle, accepted in zip(row["particle_ids"], row["accepted"], strict=True):
            if accepted:
                made.setdefault((row["step"], particle), []).append(row["move"])
    return {at: ", ".join(names) for at, names in made.items()}


def sheet_tiles(result: Result) -> list[tuple[torch.Tensor, str, bool]]:
    """Truth, measurement, particles and answer, with titles."""
    problem = result.problem
    tiles = [] if problem.truth is None else [(problem.truth[0], "truth", False)]
    y = with_gaps(problem.operator, problem.y[0])
    picture = problem.operator.picture(y)
    title = "measurement (log)" if picture is None else "measurement"
    title += "\nred: not measured" if y.isnan().any() else ""
    tiles.append((measurement_picture(y, picture), title, False))
    for row, particle in enumerate(result.particle_ids):
        tiles.append((result.images[row], particle_title(result, row, particle), result.selection.index == row))
    if result.selection is not None:
        chosen = result.particle_ids[result.selection.index]
        title = f"answer, no truth used\nparticle {chosen}, {result.selection.symmetry}"
        tiles.append((answer(result), title, True))
    return tiles


def particle_title(result: Result, row: int, particle: int) -> str:
    """Label and PSNR where there is a truth, else the data loss."""
    if result.scores is None:
        return f"particle {particle}\nloss {result.loss[row].item():.1f}"
    raw, aligned = result.scores.raw["psnr"][row], result.scores.aligned["psnr"][row]
    return f"particle {particle} [{result.modes.labels[row]}]\nraw {raw:.1f}, aligned {aligned:.1f} dB"


def ancestor_title(problem: Problem, particle: int, image: torch.Tensor) -> str:
    """With the PSNR of the better twin where there is a truth."""
    if problem.truth is None:
        return f"particle {particle}"
    aligned = agreement_db(problem.truth, image[None], problem.operator.symmetries()).item()
    return f"particle {particle}\naligned {aligned:.1f} dB"


def answer(result: Result) -> torch.Tensor:
    """The chosen image ``(C, H, W)``, turned as it was chosen."""
    symmetry = next(s for s in result.problem.operator.symmetries() if s.name == result.selection.symmetry)
    return symmetry.apply(result.images[result.selection.index][None])[0]
