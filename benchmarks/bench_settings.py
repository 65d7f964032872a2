r"""Settings against each other, image by image in turn: quality paired, cost in CPU seconds and in network calls.

    python benchmarks/bench_settings.py --images 0-9 --out results/spaces \
        --of "data=npz data.path=images.npz data.split=validation" \
        --set "latent:" --set "pixel: sampler.mcmc.space=pixel sampler.mcmc.covariance=measured"

Each setting is a run ``OUT/NAME`` of ``posterior_sample.py`` on one thread, which reconstructs one image, then it is
the next setting's turn. So a machine that becomes busier slows all of them, and what is finished is not done again. The
table holds the differences from the first setting, with standard errors over images.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def named(text: str) -> tuple[str, list[str]]:
    """``NAME: KEY=VALUE ...`` as a name and overrides."""
    name, colon, keys = text.partition(":")
    if not colon or not name.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: must be NAME: KEY=VALUE ...")
    return name.strip(), shlex.split(keys)


def span(text: str) -> range:
    """``3`` or ``0-9`` as image ids."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def main() -> None:
    """Run every setting on every image, print costs and paired differences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=span, default=span("0-2"), help="ids, as 0-9")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench_settings")
    parser.add_argument("--of", default="", help="overrides of every setting")
    parser.add_argument("--set", type=named, action="append", required=True, help="NAME: KEY=VALUE ...")
    asked = parser.parse_args()
    for image_id in asked.images:
        for name, keys in asked.set:
            run(name, image_id, asked.out, [*shlex.split(asked.of), *keys])
    folders = [asked.out / name for name, _ in asked.set]
    for folder in folders:
        print(costs(folder))
    if len(folders) > 1:
        compare = [sys.executable, str(ROOT / "tools" / "parse_metrics.py"), *map(str, folders), "--compare"]
        subprocess.run(compare, check=True)


def run(name: str, image_id: int, out: Path, keys: list[str]) -> None:
    """One image of one setting, on one thread."""
    where = [f"name={name}", f"save_dir={out}", f"data.start_id={image_id}", f"data.end_id={image_id + 1}"]
    command = [sys.executable, str(ROOT / "posterior_sample.py"), "save_trajectory=false", *keys, *where]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stderr}")
    print(f"image {image_id}, {name}: done", flush=True)


def costs(folder: Path) -> str:
    """Mean cost of an image of a finished run."""
    timing = json.loads((folder / "metrics.json").read_text())["timing"]
    calls = timing["per_image_calls"]
    means = ", ".join(f"{kind} {statistics.fmean(image[kind] for image in calls):.0f}" for kind in calls[0])
    return f"{folder.name}: {statistics.fmean(timing['per_image_cpu_seconds']):.1f} CPU s an image; calls: {means}"


if __name__ == "__main__":
    main()
