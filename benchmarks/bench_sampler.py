"""Where the time of a run goes, and how it scales, in one run on one machine.

    python benchmarks/bench_sampler.py [--model assets/cats64] [--device cpu] [--out results/bench.json]

1. Share of wall time inside network calls (denoiser forward, decoder forward and backward) at 4 particles, by
   torch.profiler. FFT, noise and bookkeeping are outside.
2. Seconds a level and peak memory against 1, 2, 4, 8 particles, as ratios to 1 particle.
3. Seconds against the number of MCMC steps, as ratios.
4. float32 against bfloat16 inside the networks.

Every measurement is a process of its own, so that peak memory is its own; rows 2 to 4 are ratios measured in this run.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":  # before torch is loaded
    from particledaps.settings.start_up import let_waiting_threads_sleep

    let_waiting_threads_sleep()

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

from particledaps.diffusion.mcmc import ChainSettings  # noqa: E402
from particledaps.operators.phase_retrieval import PhaseRetrieval  # noqa: E402
from particledaps.paths.schedules import edm_path  # noqa: E402
from particledaps.priors.embedded import load_embedded  # noqa: E402
from particledaps.priors.prior import Prior, Pullback, in_bfloat16  # noqa: E402
from particledaps.settings.device import synchronise  # noqa: E402
from particledaps.streams import ParticleStreams, measurement_generator  # noqa: E402
from sampler import LatentDAPS, SamplerSettings  # noqa: E402

NETWORK = "network_call"
LEVELS = 3


class LabelledPrior(Prior):
    """A prior whose network calls carry a profiler label."""

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        with record_function(NETWORK):
            return super().decode(z)

    def decode_with_pullback(self, z: torch.Tensor) -> tuple[torch.Tensor, Pullback]:
        with record_function(NETWORK):
            x, pullback = super().decode_with_pullback(z)

        def labelled(gradient: torch.Tensor) -> torch.Tensor:
            with record_function(NETWORK):
                return pullback(gradient)

        return x, labelled


def labelled(prior: Prior) -> Prior:
    """The same prior with labels on every network call."""
    denoiser = prior.denoiser

    def denoise(z: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        with record_function(NETWORK):
            return denoiser(z, sigma)

    return LabelledPrior(**(vars(prior) | {"denoiser": denoise}))


def make_loop(prior: Prior, device: torch.device, particles: int, steps: int) -> Callable[[], float]:
    """A function that runs :data:`LEVELS` annealing levels and returns their seconds; warmed up once."""
    operator = PhaseRetrieval()
    x = torch.zeros(1, *prior.image_shape)
    y = operator.measure(x, measurement_generator(0, 0)).to(device)
    settings = SamplerSettings(
        path=edm_path(LEVELS, 10.0, 0.1),
        inner_path=lambda sigma: edm_path(2, sigma, 0.001),
        chain=ChainSettings("hmc", steps, 2.1e-5, 0.41),
        step_size_min_ratio=0.12,
        tau=0.05,
    )
    loop = LatentDAPS(prior, operator, settings)

    def run() -> float:
        synchronise(device)
        started = time.perf_counter()
        loop.sample(y, ParticleStreams(0, 0), range(particles))
        synchronise(device)
        return time.perf_counter() - started

    run()
    return run


def network_share(prior: Prior, device: torch.device, particles: int, steps: int) -> float:
    """Share of wall time inside network calls, by torch.profiler."""
    return labelled_share(make_loop(labelled(prior), device, particles, steps), device)


def labelled_share(run: Callable[[], float], device: torch.device) -> float:
    """Share of the seconds that ``run`` returns inside the network calls of a :func:`labelled` prior."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, acc_events=True) as profiler:
        seconds = run()
    attribute = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    return sum(getattr(e, attribute) for e in profiler.key_averages() if e.key == NETWORK) * 1e-6 / seconds


def worker(arguments: argparse.Namespace) -> None:
    """One measurement, printed as JSON."""
    device = torch.device(arguments.device)
    prior = load_embedded(Path(arguments.model), device)
    prior = in_bfloat16(prior) if arguments.precision == "bfloat16" else prior
    if arguments.share:
        print(json.dumps({"share": network_share(prior, device, arguments.particles, arguments.steps)}))
        return
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    run = make_loop(prior, device, arguments.particles, arguments.steps)
    seconds = min(run() for _ in range(3)) / LEVELS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device.type == "cuda":
        before, peak = 0.0, torch.cuda.max_memory_allocated(device) / 2**20
    print(json.dumps({"seconds": seconds, "memory_mb": peak - before}))


def measure(arguments: argparse.Namespace, **changes: object) -> dict[str, float]:
    """Run one worker process."""
    options = vars(arguments) | changes
    command = [sys.executable, __file__, "--worker"]
    for key in ("model", "device", "particles", "steps", "precision"):
        command += [f"--{key}", str(options[key])]
    command += ["--share"] if options.get("share") else []
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        sys.exit(finished.stderr)
    return json.loads(finished.stdout.strip().splitlines()[-1])


def report(arguments: argparse.Namespace) -> dict[str, object]:
    """All measurements, printed as they come."""
    threads = torch.get_num_threads()
    print(
        f"device {arguments.device}, {threads} threads, torch {torch.__version__}, {arguments.steps} MCMC steps a level"
    )
    share = measure(arguments, particles=4, share=True)["share"]
    print(f"share of wall time inside network calls, 4 particles: {100 * share:.1f} %")
    by_particles = {n: measure(arguments, particles=n) for n in (1, 2, 4, 8)}
    base = by_particles[1]
    print("particles   s/level   ratio   ratio per particle   extra memory MB")
    for n, row in by_particles.items():
        ratio = row["seconds"] / base["seconds"]
        print(f"{n:>9}{row['seconds']:>10.3f}{ratio:>8.2f}{ratio / n:>21.2f}{row['memory_mb']:>18.0f}")
    by_steps = {n: measure(arguments, particles=4, steps=n) for n in (10, 20, 40)}
    print("MCMC steps  s/level   ratio")
    for n, row in by_steps.items():
        print(f"{n:>10}{row['seconds']:>9.3f}{row['seconds'] / by_steps[10]['seconds']:>8.2f}")
    half = measure(arguments, particles=4, precision="bfloat16")
    print(f"bfloat16 / float32 seconds, 4 particles: {half['seconds'] / by_particles[4]['seconds']:.2f}")
    return {"share": share, "particles": by_particles, "steps": by_steps, "bfloat16": half, "threads": threads}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Where the time of a run goes.")
    parser.add_argument("--model", default=str(ROOT / "assets" / "cats64"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--particles", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--share", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    result = report(arguments)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
