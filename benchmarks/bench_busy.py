"""What a busy machine costs: seconds a level beside one spinning neighbour a core, over seconds on the quiet machine.

    python benchmarks/bench_busy.py [--rounds 3] [--threads 2] [--steps 30] [--model assets/cats64]

With waiting threads that soon sleep (what ``posterior_sample.py`` chooses, ``particledaps/settings/start_up.py``) and
with OpenMP's own choice, that they spin. The two take turns, each in a process of its own that samples alone first and
then beside its neighbours; the median of the rounds counts. A fair share beside one neighbour a core is 2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from particledaps.settings.start_up import WAITING  # noqa: E402

CASES = {"sleep": WAITING, "spin": {}}
LIMIT_SECONDS = 3600
ALLOWED = 3.0
"""A sleeping policy may be so many times slower beside its neighbours."""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many other processes that never wait."""
    spin = f"import os\nwhile os.getppid() == {os.getpid()}: sum(range(100_000))"  # ends with whoever started it
    started = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(count)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def work(arguments: argparse.Namespace) -> None:
    """Seconds a level, alone and beside neighbours, printed as JSON."""
    import torch

    from benchmarks.bench_sampler import LEVELS, make_loop
    from particledaps.priors.embedded import load_embedded

    torch.set_num_threads(arguments.threads)
    device = torch.device("cpu")
    run = make_loop(load_embedded(Path(arguments.model), device), device, arguments.particles, arguments.steps)
    alone = run() / LEVELS
    with neighbours(arguments.neighbours):
        beside = run() / LEVELS
    print(json.dumps({"alone": alone, "beside": beside}))


def measure(case: str) -> dict[str, float]:
    """Run one worker process under a policy."""
    environment = {k: v for k, v in os.environ.items() if k not in WAITING} | CASES[case]
    command = [sys.executable, *sys.argv, "--worker"]
    finished = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=LIMIT_SECONDS
    )
    if finished.returncode != 0:
        sys.exit(finished.stderr)
    return json.loads(finished.stdout.strip().splitlines()[-1])


def report(arguments: argparse.Namespace) -> bool:
    """Measure all rounds and print the table; whether the sleeping policy keeps to :data:`ALLOWED`."""
    print(f"{arguments.threads} threads, {arguments.neighbours} neighbours, load before: {os.getloadavg()[0]:.1f}")
    rows: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
    for number in range(arguments.rounds):
        for case in CASES if number % 2 == 0 else reversed(CASES):
            rows[case].append(measure(case))
    seconds = {c: {k: statistics.median(r[k] for r in own) for k in own[0]} for c, own in rows.items()}
    quiet = seconds["spin"]["alone"]
    print(
        f"\n{'waiting threads':<16}{'s a level alone':>16}{'beside':>9}{'beside / alone':>16}{'alone / spin alone':>20}"
    )
    for case, own in seconds.items():
        ratio, price = own["beside"] / own["alone"], own["alone"] / quiet
        print(f"{case:<16}{own['alone']:>16.2f}{own['beside']:>9.2f}{ratio:>16.2f}{price:>20.2f}")
    return seconds["sleep"]["beside"] <= ALLOWED * seconds["sleep"]["alone"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "assets" / "cats64"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--neighbours", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30, help="MCMC steps a level")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments)
    elif not report(arguments):
        sys.exit(f"bench_busy.py: more than {ALLOWED:g} times slower beside its neighbours")


if __name__ == "__main__":
    main()
