"""Recompute the scores of finished runs from their saved floats, without sampling.

    python tools/rescore.py results/demo [results/other ...]

Useful after a metric changed, or once LPIPS weights are there. Selections and timings stay as they were.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from evaluation.metrics import Evaluator, load_lpips
from evaluation.modes import find_modes
from runs.build import build_operator
from runs.checks import SettingsError
from runs.metrics_file import Record
from runs.reconstruct import quality_record
from runs.record import RunFolder
from runs.settings import TaskSettings


def rescore_record(record: Record, evaluator: Evaluator, floats: Path) -> Record:
    """``record`` with metrics, modes and selected values computed anew; unchanged without truth or particles."""
    with np.load(floats, allow_pickle=False) as arrays:
        if "truth" not in arrays.files or not record["particle_ids"]:
            return record
        estimates, truth = torch.from_numpy(arrays["estimates"]), torch.from_numpy(arrays["truth"])
    scores = evaluator(estimates, truth)
    twins = [pair["child"] for pair in (record.get("optimization") or {}).get("twins", [])]
    modes = find_modes(estimates, truth, scores.aligned["psnr"], [i not in twins for i in record["particle_ids"]])
    index = record["particle_ids"].index(record["selection"]["selected_particle"])
    return record | quality_record(scores, modes, index, record["selection"]["symmetry"])


def rescore(path: Path) -> int:
    """Rescore one run folder; returns the number of images.

    Raises:
        SettingsError: the folder holds no run.
    """
    if not (path / "config.yaml").is_file():
        raise SettingsError(f"{path} holds no run (config.yaml is missing)")
    config = yaml.safe_load((path / "config.yaml").read_text())
    task = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskSettings), config["task"]))
    operator = build_operator(task)
    evaluator = Evaluator(operator.symmetries(), load_lpips(torch.device("cpu")), operator.channel_symmetries)
    folder = RunFolder(str(path.parent), path.name, config)
    records = [r for r in folder.records() if r["state"] != "failed"]
    for record in records:
        folder.save(rescore_record(record, evaluator, folder.floats_path(record["image_id"])))
    return len(records)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Recompute scores from saved floats.")
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, <save_dir>/<name>")
    for path in parser.parse_args().folders:
        try:
            print(f"{path}: {rescore(path)} images rescored")
        except (SettingsError, OSError) as error:
            sys.exit(f"rescore.py: {error}")


if __name__ == "__main__":
    main()
