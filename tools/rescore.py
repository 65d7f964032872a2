"""Recompute the scores of finished runs from their saved floats, without sampling.

    python tools/rescore.py results/demo [results/other ...]

Useful after a metric changed, or once LPIPS weights are there. Selections and timings stay as they were.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import piq
import torch
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if __name__ == "__main__":  # before torch is loaded
    from particledaps.settings.start_up import let_waiting_threads_sleep

    let_waiting_threads_sleep()

from particledaps.checks import DataError, SettingsError
from particledaps.data.npz import Archive
from particledaps.evaluation.lpips import LpipsError, read_lpips
from particledaps.evaluation.metrics import Evaluator
from particledaps.evaluation.modes import find_modes, has_twins
from particledaps.reports.write_metrics import HAS_RESULT, Record
from particledaps.runs.folder import RunFolder
from particledaps.runs.reconstruct import quality_record
from particledaps.settings.build import build_operator
from particledaps.settings.schema import TaskSettings
from particledaps.settings.stored_config import read_config


def rescore_record(record: Record, evaluator: Evaluator, floats: Path) -> Record:
    """``record`` with metrics, modes and selected values computed anew; unchanged without truth or particles."""
    with Archive(floats) as arrays:
        if "truth" not in arrays.files or not record["particle_ids"]:
            return record
        estimates, truth = torch.from_numpy(arrays.read("estimates")), torch.from_numpy(arrays.read("truth"))
    scores = evaluator(estimates, truth)
    made = [pair["child"] for pair in (record.get("optimization") or {}).get("twins", [])]
    counts = [i not in made for i in record["particle_ids"]]
    modes = find_modes(estimates, truth, scores.aligned["psnr"], counts, has_twins(evaluator.symmetries))
    index = record["particle_ids"].index(record["selection"]["selected_particle"])
    return record | quality_record(scores, modes, index, record["selection"]["symmetry"])


def rescore(path: Path, lpips: piq.ContentLoss | None = None) -> int:
    """Rescore one run folder; returns the number of images.

    Raises:
        SettingsError: the folder holds no run.
    """
    if not (path / "config.yaml").is_file():
        raise SettingsError(f"{path} holds no run (config.yaml is missing)")
    config = read_config(path / "config.yaml")
    task = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskSettings), config["task"]))
    operator = build_operator(task)
    evaluator = Evaluator(operator.symmetries(), lpips, operator.channel_symmetries)
    folder = RunFolder(str(path.parent), path.name, config)
    for damaged in folder.damaged():
        print(f"{damaged} cannot be read and is left out")
    count = 0
    for record in [r for r in folder.records() if r["state"] in HAS_RESULT]:
        try:
            folder.save_numbers(rescore_record(record, evaluator, folder.floats_path(record["image_id"])))
            count += 1
        except DataError as error:
            print(f"image {record['image_id']} keeps its scores: {error}")
    folder.save_metrics()
    return count


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Recompute scores from saved floats.")
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, <save_dir>/<name>")
    folders, lpips = parser.parse_args().folders, None
    try:
        lpips = read_lpips(torch.device("cpu"))
    except LpipsError as error:
        print(f"LPIPS is left out: {error}")
    for path in folders:
        try:
            print(f"{path}: {rescore(path, lpips)} images rescored")
        except (SettingsError, OSError) as error:
            sys.exit(f"rescore.py: {error}")


if __name__ == "__main__":
    main()
