r"""What survives kills, changed inputs and several processes in one folder: whole processes, tried and counted.

    python benchmarks/faults.py [--scale 0.1]

Every trial runs ``posterior_sample.py`` on three small pictures with the embedded prior and a handful of steps. A trial
survives if every record in the end belongs to its picture, holds the numbers of an undisturbed run, and nothing
unfinished is left. It is lost if a finished image was computed anew without need, or numbers differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("num_samples=1", "sampler.annealing.num_steps=6", "sampler.mcmc.num_steps=6", "save_trajectory=false")


@dataclass
class Bench:
    """A scratch folder with pictures, and what an undisturbed run makes of each.

    Attributes:
        folder: for everything.
        expected: digest of picture and id -> estimates.
    """

    folder: Path
    expected: dict[tuple[bytes, int], np.ndarray] = field(default_factory=dict)

    def pictures(self, name: str, seeds: range) -> Path:
        """A new folder of pictures ``<seed>.png``."""
        place = self.folder / name
        place.mkdir()
        for seed in seeds:
            self.picture(seed).save(place / f"{seed:02d}.png")
        return place

    @staticmethod
    def picture(seed: int) -> Image.Image:
        """A smooth random picture of 64 px."""
        coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)

    def start(self, pictures: Path, name: str, *more: str, output: int = subprocess.DEVNULL) -> subprocess.Popen:
        """A process of the command line; what it says goes to ``output``."""
        command = [sys.executable, str(ROOT / "posterior_sample.py"), *QUICK, "data=folder", f"data.dir={pictures}"]
        command += [f"save_dir={self.folder / 'results'}", f"name={name}", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)

    def run(self, pictures: Path, name: str, *more: str) -> int:
        """Exit status of a whole process."""
        return self.start(pictures, name, *more).wait()

    def results(self, name: str) -> Path:
        """Folder of a run."""
        return self.folder / "results" / name

    def is_right(self, name: str, pictures: Path, count: int) -> bool:
        """Does every record belong to its picture, with the numbers of an undisturbed run, and nothing more?"""
        folder = self.results(name)
        metrics = json.loads((folder / "metrics.json").read_text())
        inputs = metrics["inputs"]["per_image"]
        whole = len(inputs) == count == len({row["name"] for row in inputs})
        leftovers = [*folder.rglob("*.tmp*"), *folder.rglob("*.claim")]
        return whole and not leftovers and all(self._same(folder, pictures, row) for row in inputs)

    def _same(self, folder: Path, pictures: Path, row: dict) -> bool:
        with np.load(folder / "floats" / f"{row['image_id']:05d}.npz") as floats:
            truth, estimates = floats["truth"], floats["estimates"]
        pixels = np.asarray(Image.open(pictures / row["name"]), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        known = self.expected.setdefault((pixels.tobytes(), row["image_id"]), estimates)
        return np.allclose(truth, pixels, atol=1e-6) and np.array_equal(known, estimates)


def kills(bench: Bench, count: int) -> tuple[int, int]:
    """Kill the process at random moments, start it again, until it ends by itself."""
    pictures = bench.pictures("kills", range(3))
    done = 0
    right = 0
    chance = random.Random(0)
    bench.run(pictures, "undisturbed")
    bench.is_right("undisturbed", pictures, 3)
    for attempt in itertools.count():
        name, own = f"kill_{attempt}", 0
        while True:
            process = bench.start(pictures, name)
            try:
                process.wait(timeout=chance.uniform(3.0, 9.0) if done + own < count else None)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                own += 1
        done, right = done + own, right + own * bench.is_right(name, pictures, 3)
        if done >= count:
            return done, right


def changed(change: Callable[[Bench, Path, Path, int], int]) -> Callable[[Bench, int], tuple[int, int]]:
    """Trials of: run, change something, run again. ``change`` returns how many images there should be."""

    def trials(bench: Bench, count: int) -> tuple[int, int]:
        right = 0
        for trial in range(count):
            name = f"{change.__name__}_{trial}"
            pictures = bench.pictures(name, range(10, 13))
            bench.run(pictures, name)
            expected = change(bench, pictures, bench.results(name), trial)
            right += bench.run(pictures, name) == 0 and bench.is_right(name, pictures, expected)
        return count, right

    return trials


def added(bench: Bench, pictures: Path, results: Path, trial: int) -> int:
    """One or two more pictures, before, between or after the others."""
    bench.picture(20 + trial).save(pictures / ("00.png", "10b.png", "99.png")[trial % 3])
    if trial % 2:
        bench.picture(40 + trial).save(pictures / "11b.png")
    return 4 + trial % 2


def replaced(bench: Bench, pictures: Path, results: Path, trial: int) -> int:
    """Another picture under an old name, with the old file's time."""
    path = pictures / f"{10 + trial % 3}.png"
    stamp = path.stat()
    bench.picture(60 + trial).save(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    return 3


def copied(bench: Bench, pictures: Path, results: Path, trial: int) -> int:
    """One record copied over another, or beside it."""
    source, target = trial % 3, (trial + 1) % 3
    name = f"{target:05d}.json" if trial % 2 else f"{source:05d} (copy).json"
    shutil.copy(results / "records" / f"{source:05d}.json", results / "records" / name)
    return 3


def writers(seeds: tuple[str, ...], refused: int) -> Callable[[Bench, int], tuple[int, int]]:
    """Processes that start together in one folder; so many of them must be refused."""

    def trials(bench: Bench, count: int) -> tuple[int, int]:
        pictures, right = bench.pictures(f"writers_{len(seeds)}_{refused}", range(3)), 0
        for trial in range(count):
            name = f"writers_{len(seeds)}_{refused}_{trial}"
            started = [bench.start(pictures, name, *((f"seed={seed}",) if seed != "42" else ())) for seed in seeds]
            statuses = [process.wait() for process in started]
            seed = json.loads((bench.results(name) / "metrics.json").read_text())["metadata"]["seed"]
            held = str(seed) != "42" or bench.is_right(name, pictures, 3)
            right += held and sorted(statuses) == [0] * (len(seeds) - refused) + [2] * refused
        return count, right

    return trials


TRIALS = {
    "killed at a random moment (SIGKILL), started again": (kills, 30),
    "a picture added": (changed(added), 12),
    "a picture replaced under its name and time": (changed(replaced), 12),
    "a record copied over or beside another": (changed(copied), 12),
    "two processes of one identity at once": (writers(("42", "42"), 0), 10),
    "two processes with two seeds at once": (writers(("42", "43"), 1), 10),
    "four processes of one identity at once": (writers(("42",) * 4, 0), 6),
}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the trials to make (1)")
    scale = parser.parse_args().scale
    print("| fault | tried | survived | lost | seconds |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        for name, (trial, count) in TRIALS.items():
            started = time.perf_counter()
            tried, survived = trial(bench, max(round(scale * count), 1))
            seconds = time.perf_counter() - started
            print(f"| {name} | {tried} | {survived} | {tried - survived} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
