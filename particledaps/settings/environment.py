"""What changes numbers without being a setting: threads, processor, arithmetic flags, versions, commit."""

from __future__ import annotations

import hashlib
import platform
import subprocess
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from particledaps.checkout import ROOT

if TYPE_CHECKING:  # its import takes seconds, and a finished run needs none of it
    import torch

PACKAGES = ("torch", "torchvision", "diffusers", "timm", "numpy", "piq", "hydra-core")
NAMES = {
    "threads": "threads",
    "processor": "processor",
    "vector_instructions": "vector instructions",
    "tf32_matmul": "TF32 of products",
    "tf32_convolution": "TF32 of convolutions",
    "deterministic": "deterministic algorithms",
    "cudnn_benchmark": "cuDNN's benchmark mode",
    "source": "commit",
    "torch": "torch",
}


def environment(device: torch.device) -> dict[str, Any]:
    """The facts of this process, for the record of an image."""
    import torch

    return {
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32 if device.type == "cuda" else None,
        "tf32_convolution": torch.backends.cudnn.allow_tf32 if device.type == "cuda" else None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark if device.type == "cuda" else None,
        "source": source_state(),
        "torch": torch.__version__,
    }


def device_facts(device: torch.device) -> dict[str, str | None]:
    """Type and name of a device, for the record."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {"type": device.type, "name": name}


@cache
def processor_name() -> str | None:
    """Of this machine, where the system tells."""
    try:
        with open("/proc/cpuinfo") as handle:
            return next((line.split(":", 1)[1].strip() for line in handle if line.startswith("model name")), None)
    except OSError:
        return None


@cache
def git_commit() -> str | None:
    """Commit of this checkout, or None."""
    return _git("rev-parse", "HEAD")


@cache
def source_state() -> str | None:
    """The commit, with a checksum of the changes since; None outside a checkout."""
    changes = _git("diff", "HEAD", "--", "*.py")
    digest = hashlib.sha256(changes.encode()).hexdigest()[:12] if changes else ""
    commit = git_commit()
    return commit and commit + (f" with changes {digest}" if digest else "")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None


@cache
def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is not as it was, in words; facts that were not recorded are passed over."""
    return [
        f"{name} {_shown(before[key])} then, {_shown(now[key])} now"
        for key, name in NAMES.items()
        if key in before and before[key] != now[key]
    ]


def _shown(value: Any) -> str:
    """A value in words; of a commit its first twelve digits."""
    first, _, rest = str(value).partition(" ")
    return " ".join(filter(None, (first[:12] if len(first) == 40 else first, rest)))


def keep_threads(earlier: list[dict[str, Any]]) -> str | None:
    """Compute with as many threads as a run that goes on began with; a sentence if that is another number.

    Args:
        earlier: environments of its finished images.
    """
    import torch

    counts = {facts["threads"] for facts in earlier if facts.get("threads")}
    own = torch.get_num_threads()
    if not counts or counts == {own}:
        return None
    if len(counts) > 1:
        listed = ", ".join(map(str, sorted(counts)))
        return f"this run's images were made with {listed} threads and go on with {own}: they differ in rounding"
    (count,) = counts
    torch.set_num_threads(count)
    return f"this run began with {count} threads and goes on with as many (not {own}), which keeps its rounding"
