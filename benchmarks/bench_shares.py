r"""Where the CPU seconds of one image go: network calls by kind, transforms, random numbers, the rest.

    python benchmarks/bench_shares.py --of "data=demo data.start_id=1" \
        --set "latent:" --set "pixel: sampler.mcmc.space=pixel sampler.mcmc.covariance=measured"

One process and thread, seconds of the process (not of the clock), the settings in turn; each row is one image, loading
and scoring left out. ``fft`` is the operator's transforms, ``basis`` the change into the covariance's basis and back.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

import posterior_sample  # noqa: E402, F401 (registers the schema)
from benchmarks.bench_settings import named  # noqa: E402
from particledaps.diffusion import covariance  # noqa: E402
from particledaps.priors.prior import Prior, Pullback  # noqa: E402
from particledaps.runs.clock import PhaseClock  # noqa: E402
from particledaps.runs.problems import Inputs  # noqa: E402
from particledaps.settings.build import build_operator, build_prior  # noqa: E402
from particledaps.settings.command_line import compose_config  # noqa: E402
from particledaps.streams import ParticleStreams  # noqa: E402
from plan import build_plan, loop_settings  # noqa: E402
from run_settings import RunSettings, follow_family, validate  # noqa: E402
from sampler import LatentDAPS  # noqa: E402

KINDS = ("denoiser", "decoder", "decoder gradient", "encoder", "fft", "basis", "random")
DEVICE = torch.device("cpu")


class Shares:
    """CPU seconds by kind; what a function of one kind calls of another counts as its own."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.inside = False

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, adding its seconds to ``kind``."""

        def call(*arguments: Any, **options: Any) -> Any:
            if self.inside:
                return function(*arguments, **options)
            self.inside, started = True, time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[kind] += time.process_time() - started
                self.inside = False

        return call

    def of(self, prior: Prior) -> Prior:
        """The same prior with every network call timed."""

        class Timed(Prior):
            def decode_with_pullback(own, z: torch.Tensor) -> tuple[torch.Tensor, Pullback]:
                x, pullback = self.timed("decoder gradient", prior.decode_with_pullback)(z)
                return x, self.timed("decoder gradient", pullback)

            decode = staticmethod(self.timed("decoder", prior.decode))
            encode = staticmethod(self.timed("encoder", prior.encode))

        return Timed(**(vars(prior) | {"denoiser": self.timed("denoiser", prior.denoiser)}))

    @contextmanager
    def over(self, places: dict[str, list[tuple[Any, str]]]) -> Iterator[None]:
        """Time these functions of modules and classes meanwhile."""
        kept = [(owner, name, getattr(owner, name), kind) for kind, found in places.items() for owner, name in found]
        try:
            for owner, name, function, kind in kept:
                setattr(owner, name, self.timed(kind, function))
            yield
        finally:
            for owner, name, function, _ in kept:
                setattr(owner, name, function)


PLACES = {
    "fft": [(torch.fft, name) for name in ("rfft2", "irfft2", "fft2", "ifft2")],
    "basis": [(covariance.BandedCovariance, name) for name in ("to_basis", "from_basis")],
    "random": [(torch, "randn"), (torch, "rand")],
}


def run_once(settings: RunSettings) -> tuple[float, Counter[str]]:
    """CPU seconds of the first image, and those of each kind."""
    prior = build_prior(settings.model, settings.compat, settings.precision, settings.decode_batch, DEVICE)
    operator, loop = build_operator(settings.task), loop_settings(settings, prior.is_pixel)
    problem = Inputs(settings.data, settings.task, settings.seed, prior, operator, None).find("stop")[0].load()
    shares = Shares()
    plan = build_plan(settings, shares.of(prior), problem.operator, loop, DEVICE)
    clock = PhaseClock(DEVICE)
    clock.enter(plan.phases[0])
    sampler = LatentDAPS(plan.setup.prior, problem.operator, plan.settings, plan.hooks(clock))
    shares.seconds.clear()  # the plan may have measured a covariance
    started = time.process_time()
    with shares.over(PLACES):
        sampler.sample(problem.y, ParticleStreams(settings.seed, problem.image_id), range(settings.num_samples))
    return time.process_time() - started, shares.seconds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--of", default="", help="overrides of every setting")
    parser.add_argument("--set", type=named, action="append", required=True, help="NAME: KEY=VALUE ...")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = {}
    for name, keys in asked.set:
        runs[name] = OmegaConf.to_object(compose_config("config", [*shlex.split(asked.of), "device=cpu", *keys]))
        validate(runs[name])
    print(f"{'':<20}{'CPU s':>8}" + "".join(f"{kind:>18}" for kind in (*KINDS, "rest")))
    for name, settings in runs.items():
        total, seconds = run_once(follow_family(settings))
        parts = [seconds[kind] / total for kind in KINDS]
        print(f"{name:<20}{total:>8.1f}" + "".join(f"{100 * share:>17.1f}%" for share in (*parts, 1 - sum(parts))))


if __name__ == "__main__":
    main()
