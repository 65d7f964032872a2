r"""What starting and bookkeeping cost: CPU seconds and peak memory of whole processes.

    python benchmarks/bench_start.py [--files 10 1000 10000] [--records 100 1000 3000]

Every figure is that of one whole process, by the operating system's accounting; with several rounds the median.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

QUICK = ("num_samples=1", "sampler.annealing.num_steps=1", "sampler.mcmc.num_steps=1", "save_trajectory=false")


def process(*command: str | Path) -> tuple[float, float, int]:
    """CPU seconds, peak memory in MB and exit status of a Python process."""
    started = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    _, status, usage = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, started.returncode


def row(name: str, rounds: int, *command: str | Path) -> None:
    """Measure a process and print a row of the table."""
    found = [process(*command) for _ in range(rounds)]
    seconds, memory = (statistics.median(values) for values in list(zip(*found, strict=True))[:2])
    print(f"| {name} | {seconds:.2f} | {memory:.0f} | {found[-1][2]} |", flush=True)


def pictures(folder: Path, count: int) -> Path:
    """A folder of ``count`` small pictures, all different."""
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for number in range(count):
        pixels[0, 0] = number & 255, number >> 8, 0
        Image.fromarray(pixels).save(folder / f"{number:05d}.png", compress_level=1)
    return folder


def starts(scratch: Path, counts: list[int], rounds: int) -> None:
    """Start-up of the programs, and of runs over folders of several sizes."""
    program, results = ROOT / "posterior_sample.py", f"save_dir={scratch / 'results'}"
    print("| process | CPU seconds | peak memory, MB | status |\n|---|---|---|---|")
    row("`import torch` alone, to compare", rounds, "-c", "import torch")
    row("`--help`", rounds, program, "--help")
    row("an unknown key", rounds, program, "num_sampels=2")
    row("an impossible value", rounds, program, "num_samples=0")
    row("a run of one image and one level", 1, program, *QUICK, results, "data.end_id=1", "name=one")
    row("the same again: finished", rounds, program, *QUICK, results, "data.end_id=1", "name=one")
    row("`parse_metrics` of it", rounds, ROOT / "tools" / "parse_metrics.py", scratch / "results" / "one")
    for count in counts:
        folder = pictures(scratch / f"pictures{count}", count)
        own = (*QUICK, results, "data=folder", f"data.dir={folder}", f"name=of{count}", "data.end_id=1")
        row(f"one image of a folder of {count}", 1, program, *own)
        row("the same again: finished", rounds, program, *own)


def bookkeeping(scratch: Path, counts: list[int]) -> None:
    """CPU seconds that records and metrics.json take of a run, were each image to take a second."""
    from particledaps.runs.folder import RunFolder
    from particledaps.settings.stored_config import read_config

    one = scratch / "results" / "one"
    template, config = json.loads((one / "records" / "00000.json").read_text()), read_config(one / "config.yaml")
    print("\n| records | CPU seconds in all | a record, ms | reading them all at a start | metrics.json, MB |")
    print("|---|---|---|---|---|")
    for count in counts:
        folder, clock = RunFolder(str(scratch / "results"), f"books{count}", config), [0.0]
        folder.open()
        folder.clock = lambda clock=clock: clock[0] + time.process_time()
        started = time.process_time()
        for image_id in range(count):
            clock[0] += 1.0  # the image itself
            folder.save(template | {"image_id": image_id})
        folder.save_metrics()
        spent, again = time.process_time() - started, time.process_time()
        RunFolder(str(scratch / "results"), f"books{count}", config).summaries()
        reading = time.process_time() - again
        size = (folder.path / "metrics.json").stat().st_size / 1e6
        print(f"| {count} | {spent:.1f} | {1000 * spent / count:.1f} | {reading:.1f} | {size:.1f} |", flush=True)
        shutil.rmtree(folder.path)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, nargs="*", default=[10, 1000, 10000])
    parser.add_argument("--records", type=int, nargs="*", default=[100, 1000, 3000])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        starts(Path(scratch), arguments.files, arguments.rounds)
        bookkeeping(Path(scratch), arguments.records)


if __name__ == "__main__":
    main()
