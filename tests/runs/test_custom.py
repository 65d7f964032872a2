"""Priors and operators of the user's own: every mistake ends in one sentence that names the place."""

import sys

import pytest
import torch
from analytic import prior_of
from tiny import reconstruct

from particledaps.checks import SettingsError
from particledaps.operators.operator import Operator
from particledaps.settings.custom import call_target, check_custom_operator, check_custom_prior

CODE = """
from particledaps.operators.operator import Operator

class Halves(Operator):
    name, noise_sigma = "halves", 0.1
    def __init__(self, fault=None):
        if fault == "value":
            raise ValueError("fault=value: must be another")
        if fault == "key":
            raise KeyError("lost")
        self.fault = fault
    def __call__(self, x):
        if self.fault == "call":
            return x[:, 7]
        if self.fault == "batch":
            return x[:1, :, ::2]
        return x[:, :, ::2]
    def measurement_shape(self, image_shape):
        rows = image_shape[1] if self.fault == "shape" else image_shape[1] // 2
        return image_shape[0], rows, image_shape[2]
"""
TARGET = "task.target", "lab_halves:Halves"


@pytest.fixture(autouse=True)
def lab(tmp_path, monkeypatch):
    (tmp_path / "lab_halves.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "lab_halves.py"
    sys.modules.pop("lab_halves", None)


def test_a_factory_that_fails_names_the_error_and_its_line(lab):
    with pytest.raises(SettingsError) as refused:
        call_target(*TARGET, Operator, fault="key")
    line = CODE.splitlines().index('            raise KeyError("lost")') + 1
    assert str(refused.value) == f"task.target=lab_halves:Halves: KeyError: 'lost' ({lab}, line {line})"


def test_a_value_error_is_told_as_it_is():
    with pytest.raises(SettingsError, match="^task.target=lab_halves:Halves: fault=value: must be another$"):
        call_target(*TARGET, Operator, fault="value")


def test_an_operator_that_keeps_its_word_passes():
    check_custom_operator(call_target(*TARGET, Operator), (3, 8, 8))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("call", "task=halves: IndexError: index 7"),
        ("shape", "the shape (2, 3, 4, 8), but measurement_shape announces (2, 3, 8, 8)"),
        ("batch", "the shape (1, 3, 4, 8), but measurement_shape announces (2, 3, 4, 8)"),
    ],
)
def test_an_operator_that_breaks_its_word_is_refused(lab, fault, words):
    with pytest.raises(SettingsError) as refused:
        check_custom_operator(call_target(*TARGET, Operator, fault=fault), (3, 8, 8))
    assert words in str(refused.value)
    assert (f"{lab}, line" in str(refused.value)) == (fault == "call")


class Gate(torch.nn.Module):
    """An autoencoder of pixels that loses columns where it is told to."""

    def __init__(self, narrow=None):
        super().__init__()
        self.narrow = narrow

    def encode(self, x):
        return x[..., 1:] if self.narrow == "encode" else x

    def decode(self, z):
        return z[..., 1:] if self.narrow == "decode" else z


def lose_rows(z, sigma):
    return z[:, :, 1:]


def keep(z, sigma):
    return z


@pytest.mark.parametrize(
    ("denoiser", "narrow", "words"),
    [
        (keep, None, None),
        (lose_rows, None, "denoiser(z, sigma) has the shape (4, 3, 7, 8), not (4, 3, 8, 8)"),
        (keep, "decode", "decode(z) has the shape (4, 3, 8, 7), not (4, 3, 8, 8)"),
        (keep, "encode", "encode(x) has the shape (4, 3, 8, 7), not (4, 3, 8, 8)"),
        (lambda z, sigma: z @ z[0, 0, :3], None, "RuntimeError: "),
    ],
    ids=["right", "denoiser", "decode", "encode", "error"],
)
def test_a_prior_is_held_to_the_shapes_that_it_announces(denoiser, narrow, words):
    prior = prior_of(denoiser, (3, 8, 8), Gate(narrow))
    if words is None:
        check_custom_prior(prior, "lab:build", 4, torch.device("cpu"))
        return
    with pytest.raises(SettingsError) as refused:
        check_custom_prior(prior, "lab:build", 4, torch.device("cpu"))
    assert str(refused.value).startswith(f"model.target=lab:build: {words}")


def test_the_command_line_tells_it_before_anything_is_written(lab):
    results = lab.parent / "results"
    outcome = reconstruct(
        "model=stationary_gaussian",
        "model.options.side=8",
        "sampler=pixel_daps",
        "task=custom",
        "task.target=lab_halves:Halves",
        "+task.options.fault=call",
        f"save_dir={results}",
        "data.end_id=1",
        "device=cpu",
    )
    assert outcome.status == 2 and outcome.err.count("\n") == 1 and not results.exists()
    assert outcome.err.startswith("posterior_sample.py: task=halves: IndexError")
