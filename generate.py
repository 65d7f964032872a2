"""Draw images from any prior: from pure noise along the probability-flow ODE, or by another solver.

python generate.py                                                     # 16 cats, results/samples.png
python generate.py model=embedded model.path=assets/dogs64 count=64 out=results/dogs
python generate.py model=diffusers model.path=FOLDER device=cuda solver=dpmpp2m num_steps=20
"""

from __future__ import annotations

from particledaps.settings.start_up import begin, exit_stopped, loading

PROGRAM = "generate.py"
if __name__ == "__main__":
    begin(PROGRAM)

import shlex  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from dataclasses import asdict, dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402

import hydra  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from particledaps.checks import Checks, DataError, SettingsError  # noqa: E402
from particledaps.diffusion.solvers import SOLVERS, Solver  # noqa: E402
from particledaps.paths.schedules import DRAWING_PATHS  # noqa: E402
from particledaps.priors.errors import PriorError  # noqa: E402
from particledaps.settings.command_line import CONFIG_DIR, fail, member, register, run  # noqa: E402
from particledaps.settings.schema import CompatSettings, ModelSettings  # noqa: E402
from particledaps.settings.statuses import DISK, FAILED, StoppedError, disk_fault  # noqa: E402

OLD_FLAGS = {"--model": "model.path", "--count": "count", "--seed": "seed", "--out": "out"}


@dataclass
class GenerateSettings:
    """Everything that ``generate.py`` can be told.

    Attributes:
        count: how many images; image i depends on ``seed`` and i only.
        seed: of the noise.
        num_steps: steps from noise to image.
        solver: ``heun`` (two network calls a step), ``euler``, ``ddim`` (Euler with ``eta``), ``dpmpp2m``
            (DPM-Solver++(2M)), ``unipc`` (that with a corrector), or ``consistency`` (denoise, then re-noise).
        eta: of ``ddim``: 0 is the ODE, 1 draws as much noise as DDPM.
        path: where the steps lie: ``edm`` (rho 7), ``cosine``, ``tan`` (best for a Gaussian), ``trailing`` (equal
            strides of the network's timesteps), or a table of Align Your Steps: ``ays``, ``ays_xl``, ``ays_video``.
        batch_size: images drawn at once; another one changes rounding.
        out: a PNG for one grid, or a folder for single images.
        save_dir: where a sweep keeps its own files.
        device: ``auto``, ``cpu`` or ``cuda``.
        gpu: index of the CUDA device.
        use_tpu: run on a TPU (needs torch_xla).
        precision: ``float32``; or ``bfloat16`` or ``float16`` inside the networks.
        decode_batch: decode at most this many images at once, to save memory; null: all.
        model: the prior.
        compat: conventions of the official code.
    """

    count: int = 16
    seed: int = 42
    num_steps: int = 40
    solver: str = "heun"
    eta: float = 0.0
    path: str = "edm"
    batch_size: int = 64
    out: str = "results/samples.png"
    save_dir: str = "results"
    device: str = "auto"
    gpu: int = 0
    use_tpu: bool = False
    precision: str = "float32"
    decode_batch: int | None = None
    model: ModelSettings = field(default_factory=ModelSettings)
    compat: CompatSettings = field(default_factory=CompatSettings)


register("generate_settings", GenerateSettings)


def validate(settings: GenerateSettings) -> None:
    """Check every value.

    Raises:
        SettingsError: with one line a problem.
    """
    from particledaps.settings.validation import check_machine, check_model

    checks = Checks()
    checks.number("count", settings.count, 1, 1_000_000)
    checks.number("seed", settings.seed, 0)
    checks.number("num_steps", settings.num_steps, 1, 100_000)
    checks.choice("solver", settings.solver, SOLVERS)
    checks.choice("path", settings.path, DRAWING_PATHS)
    checks.number("batch_size", settings.batch_size, 1, 100_000)
    checks.number("eta", settings.eta, 0, 1)
    checks.require(
        settings.eta == 0 or settings.solver == "ddim", f"eta={settings.eta:g}: only solver=ddim draws so much noise"
    )
    check_machine(settings.device, settings.gpu, settings.precision, settings.decode_batch, checks)
    checks.require(bool(settings.out.strip()), "out='': name a PNG or a folder")
    check_model(settings.model, checks)
    checks.finish()


def generate(settings: GenerateSettings) -> None:
    """Load the prior, draw, write."""
    validate(settings)
    with loading():  # the slow part
        from particledaps.particles.prior_draws import drawing_path
        from particledaps.runs.calls import Calls, count_calls
        from particledaps.runs.draw import draw, write, write_record
        from particledaps.settings.build import build_prior
        from particledaps.settings.device import choose_device

    device = choose_device(settings.device, settings.gpu, settings.use_tpu)
    prior = build_prior(settings.model, settings.compat, settings.precision, settings.decode_batch, device)
    path, solver = drawing_path(prior, settings.num_steps, settings.path), Solver(settings.solver, settings.eta)
    calls, started = Calls(), time.process_time()
    images = draw(
        count_calls(prior, calls), settings.count, settings.seed, settings.num_steps, device, solver, settings.path,
        settings.batch_size,
    )  # fmt: skip
    spent = time.process_time() - started
    if not images.isfinite().all():
        raise StoppedError(f"the images of {prior.name} hold numbers that are not finite; try precision=float32")
    write(prior, images, Path(settings.out), settings.seed)
    write_record(Path(settings.out), asdict(settings), prior, path.tolist(), calls, spent, device)
    print(f"{settings.count} images of {prior.name}: {settings.out}")


def old_flags(arguments: list[str]) -> str | None:
    """A sentence with the new command where ``arguments`` are those of the older ``--model X --count N``."""
    if not any(a.partition("=")[0] in OLD_FLAGS for a in arguments):
        return None
    words, keys = [w for a in arguments for w in (a.split("=", 1) if a.startswith("--") else [a])], []
    for flag, value in zip(words, [*words[1:], ""], strict=True):
        if flag in OLD_FLAGS:
            keys += ["model=embedded"] * (flag == "--model") + [f"{OLD_FLAGS[flag]}={value}"]
    return f"takes keys instead of flags now: python {PROGRAM} {shlex.join(keys)}"


@hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="generate")
@member(PROGRAM)
def main(config: DictConfig) -> None:
    """Compose, check and draw; errors end in one sentence and a non-zero status."""
    try:
        generate(OmegaConf.to_object(config))
    except (SettingsError, DataError, PriorError) as error:
        fail(PROGRAM, str(error))
    except StoppedError as error:
        fail(PROGRAM, str(error), FAILED)
    except OSError as error:
        fail(PROGRAM, disk_fault(error), DISK)
    except KeyboardInterrupt as stop:
        exit_stopped(PROGRAM, stop, "images that are written are kept")


if __name__ == "__main__":
    if (sentence := old_flags(sys.argv[1:])) is not None:
        fail(PROGRAM, sentence)
    run(PROGRAM, "generate", main)
