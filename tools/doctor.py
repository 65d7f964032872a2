"""Check an installation and a prior, and say what to do about each finding.

    python tools/doctor.py                      # the embedded prior
    python tools/doctor.py model=ffhq256ldm     # any other, with any override of posterior_sample.py

Exit status: 0 when the selected prior works, 1 with a problem, 2 for input that cannot be used.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":  # before torch is loaded
    from particledaps.settings.start_up import let_waiting_threads_sleep

    let_waiting_threads_sleep()

from particledaps.doctor.installation import (
    NOTE,
    OK,
    PROBLEM,
    Finding,
    disk_finding,
    package_findings,
    python_finding,
    requirements,
)

if TYPE_CHECKING:  # torch and Hydra may be what is missing
    from run_settings import RunSettings

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "doctor.py"
WIDTH = 116
INDENT = 11
DEFAULT_MODEL = "cats64"


class Report:
    """Prints findings as they come and keeps count of their states."""

    def __init__(self) -> None:
        self.counts = {OK: 0, NOTE: 0, PROBLEM: 0}

    def section(self, title: str, findings: Iterable[Finding]) -> list[Finding]:
        """Print a heading and its findings, each as soon as it is known."""
        print(f"\n{title}", flush=True)
        found = []
        for finding in findings:
            self.counts[finding.state] += 1
            self.show(finding)
            found.append(finding)
        return found

    @staticmethod
    def show(finding: Finding) -> None:
        """One finding: state, text, table, remedy."""
        blank = " " * INDENT
        text = textwrap.fill(finding.text, WIDTH, break_long_words=False, break_on_hyphens=False)
        print(f"  {finding.state:<{INDENT - 2}}" + text.replace("\n", "\n" + blank))
        for line in finding.table:
            print(f"{blank}  {line}")
        if finding.remedy is not None:
            print(f"{blank}-> {finding.remedy}")
        sys.stdout.flush()

    def close(self, seconds: float, model: str) -> int:
        """The last line; returns the exit status."""
        notes = f"{self.counts[NOTE]} note{'' if self.counts[NOTE] == 1 else 's'}"
        problems = f"{self.counts[PROBLEM]} problem{'' if self.counts[PROBLEM] == 1 else 's'}"
        verdict = f"model={model} works" if self.counts[PROBLEM] == 0 else "not ready: see the arrows"
        print(f"\n{verdict}; {problems}, {notes} ({seconds:.0f} s)")
        return int(self.counts[PROBLEM] > 0)


def read_settings(overrides: list[str]) -> RunSettings:
    """Compose and check the settings as ``posterior_sample.py`` does.

    Raises:
        SystemExit: status 2, with a sentence, where they cannot be used.
    """
    from omegaconf import OmegaConf

    from particledaps.checks import SettingsError
    from particledaps.settings.command_line import check_overrides, compose_config, fail, register
    from run_settings import RunSettings, validate

    register("run_settings", RunSettings)
    problem = check_overrides("config", overrides)
    if problem is not None:
        fail(PROGRAM, problem)
    settings = OmegaConf.to_object(compose_config("config", overrides))
    try:
        validate(settings)
    except SettingsError as error:
        fail(PROGRAM, str(error))
    return settings


def device_findings(settings: RunSettings) -> Iterable[Finding]:
    """The device that a run would take, its memory, and whether it computes in bfloat16."""
    import torch

    from particledaps.checks import SettingsError
    from particledaps.settings.device import choose_device

    try:
        device = choose_device(settings.device, settings.gpu, settings.use_tpu)
    except SettingsError as error:
        yield Finding(PROBLEM, str(error))
        return
    if device.type == "cuda":
        free, total = (n / 1e9 for n in torch.cuda.mem_get_info(device))
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        text = f"{torch.cuda.get_device_name(device)}: {free:.0f} of {total:.0f} GB free, CUDA {torch.version.cuda}"
        yield Finding(OK, f"{text}, {'computes' if bfloat16 else 'does not compute'} in bfloat16")
        if settings.precision == "bfloat16" and not bfloat16:
            yield Finding(NOTE, "precision=bfloat16 is emulated on this GPU, and slow", "precision=float32")
        return
    yield Finding(OK, f"{device.type}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if not torch.cuda.is_available():
        text = "torch sees no CUDA device: right for cats64, very slow for 256 px priors"
        yield Finding(NOTE, text, "with an NVIDIA GPU: install its driver, then a CUDA build of torch (pytorch.org)")


def prior_findings(settings: RunSettings, model: str) -> Iterable[Finding]:
    """Load the prior and put it to work."""
    from particledaps.checks import SettingsError
    from particledaps.doctor.prior import check_prior
    from particledaps.priors.cards import card_of_model
    from particledaps.priors.errors import PriorError
    from particledaps.settings.build import build_prior
    from particledaps.settings.device import choose_device

    card = card_of_model(model)
    fetch = card.command() if card is not None and settings.model.path in card.model_paths() else None
    started = time.perf_counter()
    try:
        device = choose_device(settings.device, settings.gpu, settings.use_tpu)
        prior = build_prior(settings.model, settings.compat, settings.precision, settings.decode_batch, device)
    except (PriorError, SettingsError) as error:
        yield Finding(PROBLEM, f"cannot be loaded: {error}", fetch)
        return
    yield Finding(
        OK,
        f"{prior.name} loaded from {settings.model.path or settings.model.target} "
        f"in {time.perf_counter() - started:.1f} s",
    )
    try:
        yield from check_prior(prior, card, device)
    except Exception as error:  # a prior of the user's own may fail in any way
        yield Finding(PROBLEM, f"fails at work: {type(error).__name__}: {' '.join(str(error).split())[:300]}", fetch)


def weight_findings(settings: RunSettings, model: str) -> Iterable[Finding]:
    """Files that others published, LPIPS, DINO."""
    from particledaps.doctor.weights import card_findings, dino_finding, lpips_finding
    from particledaps.priors.cards import card_of_model

    yield from card_findings(card_of_model(model))
    yield lpips_finding()
    yield dino_finding(settings.repulsion_dino_model, settings.repulsion_dino_path)


def examine(overrides: list[str]) -> int:
    """The whole examination; returns the exit status."""
    started, report = time.perf_counter(), Report()
    model = next((o.partition("=")[2] for o in reversed(overrides) if o.startswith("model=")), DEFAULT_MODEL)
    wanted = requirements(ROOT / "requirements.txt")
    packages = [python_finding(), *package_findings(wanted)]
    if any(finding.state == PROBLEM for finding in packages):
        report.section("Python and packages", packages)
        return report.close(time.perf_counter() - started, model)
    settings = read_settings(overrides)  # before the first line: bad input gives one sentence
    report.section("Python and packages", packages)
    report.section("Device and disk", [*device_findings(settings), disk_finding(Path(settings.save_dir))])
    report.section(f"Prior model={model}", prior_findings(settings, model))
    report.section("Other weights", weight_findings(settings, model))
    return report.close(time.perf_counter() - started, model)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for posterior_sample.py: model=NAME, ...")
    raise SystemExit(examine(parser.parse_args(argv).overrides))


if __name__ == "__main__":
    main()
