"""The device of a run, and what it is slow at."""

import sys
import types

import pytest
import torch
from tiny import reconstruct

from particledaps.checks import Checks, SettingsError
from particledaps.settings import device as devices
from particledaps.settings.device import choose_device, slow_precision

CPU = torch.device("cpu")


@pytest.fixture
def xla(monkeypatch):
    """A stand-in for torch_xla that sees a device of the given kind, or fails."""

    def install(kind):
        def device_type():
            if kind is None:
                raise RuntimeError("TPU initialization failed")
            return kind

        module, runtime = types.ModuleType("torch_xla"), types.ModuleType("torch_xla.runtime")
        module.device, runtime.device_type, module.runtime = lambda: torch.device("meta"), device_type, runtime
        monkeypatch.setitem(sys.modules, "torch_xla", module)
        monkeypatch.setitem(sys.modules, "torch_xla.runtime", runtime)

    return install


def test_a_tpu_that_is_there(xla):
    xla("TPU")
    assert choose_device("auto", use_tpu=True).type == "meta"


@pytest.mark.parametrize(
    ("kind", "words"), [("CPU", "torch_xla sees a CPU, no TPU"), (None, "torch_xla finds no device")]
)
def test_torch_xla_without_a_tpu_is_refused(xla, kind, words):
    xla(kind)
    with pytest.raises(SettingsError, match=f"use_tpu=true: {words}"):
        choose_device("auto", use_tpu=True)


def test_a_tpu_and_another_device_contradict_each_other(xla):
    xla("TPU")
    with pytest.raises(SettingsError, match="use_tpu=true and device=cpu contradict"):
        choose_device("cpu", use_tpu=True)


@pytest.mark.parametrize(
    ("precision", "flags", "slow"),
    [
        ("float32", {"avx2"}, False),
        ("float16", {"avx2", "avx512_bf16"}, True),
        ("bfloat16", {"avx2"}, True),
        ("bfloat16", {"avx512_bf16"}, False),
        ("bfloat16", None, False),
    ],
)
def test_a_precision_that_is_emulated_is_told(monkeypatch, precision, flags, slow):
    monkeypatch.setattr(devices, "processor_flags", lambda: flags)
    sentence = slow_precision(precision, CPU)
    assert (sentence is not None) == slow
    if slow:
        assert sentence.startswith(f"precision={precision}: ") and "precision=float32" in sentence
    assert slow_precision(precision, torch.device("meta")) is None


@pytest.mark.parametrize("value", [1e-170, 1e-300, 5e-324, 1e-16])
def test_numbers_too_small_to_compute_with_are_refused(value):
    checks = Checks()
    checks.number("sampler.mcmc.tau", value, 0, open_low=True)
    assert checks.problems == [f"sampler.mcmc.tau={value:g}: too small to compute with; the least is 1e-15"]


@pytest.mark.parametrize("key", ["sampler.mcmc.tau", "optimization_tau", "task.noise_sigma", "symmetry_tau"])
def test_a_tau_whose_square_vanishes_is_refused_before_anything_loads(key):
    outcome = reconstruct(f"{key}=1e-170", "optimization_step=200", "symmetry_moves=[flip]")
    assert outcome.status == 2 and f"{key}=1e-170: too small to compute with" in outcome.err
