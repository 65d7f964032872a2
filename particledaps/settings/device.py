"""The device of a run."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from particledaps.checks import SettingsError

DEVICES = ("auto", "cpu", "cuda")


def synchronise(device: torch.device) -> None:
    """Wait for queued kernels, so that a clock reads what was done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_device(device: str, gpu: int = 0, use_tpu: bool = False) -> torch.device:
    """The device that the keys ask for.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        gpu: index of the CUDA device.
        use_tpu: run on a TPU.

    Raises:
        SettingsError: that device is not there.
    """
    if use_tpu:
        return _tpu(device)
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SettingsError("device=cuda: torch sees no CUDA device; use device=cpu or device=auto")
    if gpu >= torch.cuda.device_count():
        raise SettingsError(f"gpu={gpu}: this machine has CUDA devices 0 to {torch.cuda.device_count() - 1}")
    return torch.device("cuda", gpu)


def _tpu(asked: str) -> torch.device:
    """The TPU, where there is one.

    Raises:
        SettingsError: there is none, or another device is asked for beside it.
    """
    try:
        import torch_xla
        from torch_xla import runtime

        kind, device = runtime.device_type(), torch_xla.device()
    except ImportError as error:
        raise SettingsError(
            "use_tpu=true: needs the package torch_xla on a TPU machine (pip install torch_xla); "
            "use device=cpu or device=cuda here"
        ) from error
    except Exception as error:  # it asks the system for its hardware, and fails in many ways
        reason = " ".join(str(error).split())[:160]
        raise SettingsError(f"use_tpu=true: torch_xla finds no device ({reason})") from error
    if asked != "auto":
        raise SettingsError(f"use_tpu=true and device={asked} contradict each other; leave one of them out")
    if kind != "TPU":
        raise SettingsError(f"use_tpu=true: torch_xla sees a {kind}, no TPU; use device=cpu or device=cuda here")
    return device


BFLOAT16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")
"""How x86 and ARM processors say that they compute in bfloat16."""


def slow_precision(precision: str, device: torch.device) -> str | None:
    """A sentence where a precision is emulated on this device, and far slower than float32; else None."""
    if device.type != "cpu" or precision == "float32":
        return None
    flags = processor_flags()
    if precision == "bfloat16" and (flags is None or set(BFLOAT16_FLAGS) & flags):
        return None
    better = "" if precision == "bfloat16" else "bfloat16 (where the processor has it) or "
    return (
        f"precision={precision}: this processor has no arithmetic for it, so networks run many times slower than in "
        f"float32; use {better}precision=float32"
    )


@cache
def processor_flags() -> set[str] | None:
    """What this machine's processor can do, by the system's words; None where it does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))), None)
    return None if found is None else set(found.split())
