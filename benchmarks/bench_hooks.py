"""What each hook costs: seconds of one image with it over seconds without, in one run on one machine.

    python benchmarks/bench_hooks.py [--rounds 2] [--device cpu] [OVERRIDES of posterior_sample.py]

The settings take turns, and the fastest round of each counts. The last column is the share of wall time inside network
calls (denoiser forward, decoder forward and backward) by torch.profiler. Default sampler, 4 particles.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":  # before torch is loaded
    from particledaps.settings.start_up import let_waiting_threads_sleep

    let_waiting_threads_sleep()

import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import posterior_sample  # noqa: E402, F401 (registers the schema)
from benchmarks.bench_sampler import labelled, labelled_share  # noqa: E402
from particledaps.priors.prior import Prior  # noqa: E402
from particledaps.runs.clock import PhaseClock  # noqa: E402
from particledaps.settings.build import build_operator, build_prior  # noqa: E402
from particledaps.settings.command_line import compose_config  # noqa: E402
from particledaps.settings.device import synchronise  # noqa: E402
from particledaps.streams import ParticleStreams, measurement_generator  # noqa: E402
from plan import build_plan, loop_settings  # noqa: E402
from run_settings import RunSettings, validate  # noqa: E402
from sampler import LatentDAPS  # noqa: E402

POSTERIOR = ["optimization_step=0", "optimization_prior_sigma=0.1", "optimization_max_iters=60"]
CASES = {
    "none": [],
    "repulsion, latent": ["repulsion_scale=0.1", "repulsion_features=latent"],
    "repulsion, pixel, odd": ["repulsion_scale=0.1", "repulsion_features=pixel", "repulsion_kernel=odd"],
    "prune 4 to 2 at t = 200": ["pruning_step=200"],
    "prune 4 to 2 at t = 400": ["pruning_step=400"],
    "prune 4 to 2 at t = 600": ["pruning_step=600"],
    "optimise at the end, 60": [*POSTERIOR],
    "prune at 400, optimise": ["pruning_step=400", *POSTERIOR],
}


def run_once(prior: Prior, settings: RunSettings, device: torch.device) -> float:
    """Seconds of one image."""
    operator, sampling = build_operator(settings.task), loop_settings(settings)
    plan = build_plan(settings, prior, operator, sampling, device)
    y = operator.measure(torch.zeros(1, *prior.image_shape), measurement_generator(0, 0)).to(device)
    clock = PhaseClock(device)
    clock.enter(plan.phases[0])
    loop = LatentDAPS(prior, operator, sampling, plan.hooks(clock))
    synchronise(device)
    started = time.perf_counter()
    loop.sample(y, ParticleStreams(0, 0), range(settings.num_samples))
    synchronise(device)
    return time.perf_counter() - started


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What each hook costs.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("overrides", nargs="*", help="of posterior_sample.py, e.g. precision=bfloat16")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    cases = {}
    for name, overrides in CASES.items():
        cases[name] = OmegaConf.to_object(compose_config("config", [*overrides, *arguments.overrides]))
        validate(cases[name])
    none = cases["none"]
    prior = build_prior(none.model, none.compat, none.precision, none.decode_batch, device)
    run_once(prior, cases["none"], device)  # warm up
    seconds = {name: [] for name in cases}
    for _ in range(arguments.rounds):
        for name, settings in cases.items():
            seconds[name].append(run_once(prior, settings, device))
    print(f"device {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'hooks':<26}{'s/image':>9}{'ratio':>8}{'network':>9}")
    for name, settings in cases.items():
        best = min(seconds[name])
        share = labelled_share(partial(run_once, labelled(prior), settings, device), device)
        print(f"{name:<26}{best:>9.2f}{best / min(seconds['none']):>8.3f}{100 * share:>8.1f}%")


if __name__ == "__main__":
    main()
