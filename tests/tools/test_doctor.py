"""tools/doctor.py: exit status, and that its report names what to do."""

import sys
from importlib import metadata

import original_layouts
import pytest
import torch
from tiny import captured, no_lpips, tiny_prior  # noqa: F401 (fixtures)
from tiny_checkpoints import checkpoints  # noqa: F401 (fixture)

from particledaps.doctor import installation
from particledaps.priors.conversion.convert import convert_checkpoint
from tools import doctor


def examine(*arguments):
    return captured(lambda: doctor.main([*map(str, arguments), "device=cpu"]))


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    """No downloaded file, so that a developer's own change nothing."""
    monkeypatch.setenv("PARTICLEDAPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "particledaps.doctor.weights.dino_finding", lambda *asked: installation.Finding("note", "no dino")
    )


def test_the_embedded_prior_works():
    outcome = examine()
    assert outcome.status == 0 and outcome.err == ""
    assert "model=cats64 works; 0 problems" in outcome.out
    assert "beats the best shrinkage at every noise level" in outcome.out
    assert all(line in outcome.out for line in ("Python and packages\n", "Device and disk\n", "Prior model=cats64\n"))
    assert max(map(len, outcome.out.splitlines())) <= 130


def test_random_weights_are_a_problem(tiny_prior):  # noqa: F811
    outcome = examine("model=embedded", f"model.path={tiny_prior}")
    assert outcome.status == 1 and "not ready" in outcome.out
    assert "problem  the denoiser is no better than shrinking its input" in outcome.out


def assert_at_work(outcome, loaded):
    """The prior was loaded and measured to the end; random weights leave exactly that to say."""
    assert outcome.status == 1 and outcome.err == ""
    assert f"ok       {loaded} loaded from" in outcome.out and "timesteps, sigma" in outcome.out
    assert "problem  the denoiser is no better than shrinking its input" in outcome.out
    assert not any(words in outcome.out for words in ("cannot be loaded", "fails at work", "nan", "Traceback"))


CONVERTED = {
    "ldm_ffhq256": "ffhq256ldm",
    "ldm_imagenet256": "imagenet256ldm",
    "adm_ffhq256": "ffhq256ddpm",
    "adm_imagenet256": "imagenet256ddpm",
}


@pytest.mark.parametrize(("family", "model"), CONVERTED.items())
def test_a_converted_checkpoint_of_each_family_is_put_to_work(family, model, tmp_path):
    torch.save({"state_dict": original_layouts.checkpoints()[family]}, tmp_path / "original.ckpt")
    architecture = original_layouts.ARCHITECTURES[family]
    convert_checkpoint(tmp_path / "original.ckpt", tmp_path / family, None, True, architecture, lambda line: None)
    outcome = examine(f"model={model}", f"model.path={tmp_path / family}")
    assert_at_work(outcome, family)
    assert "as its card says" in outcome.out
    raw = examine(f"model={model}", f"model.path={tmp_path / 'original.ckpt'}")
    assert "convert_checkpoint.py" in raw.out and "-> bash download.sh ldm" not in raw.out  # a file of the user's own


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("stable_diffusion", ["model=stable-diffusion-v1.5", "model.prompt=a cat", "model.guidance_scale=3"]),
        ("stable_diffusion", ["model=diffusers", "precision=bfloat16"]),
        ("ddpm", ["model=diffusers"]),
    ],
)
def test_diffusers_folders_are_put_to_work(checkpoints, name, overrides):  # noqa: F811
    assert_at_work(examine(*overrides, f"model.path={checkpoints[name]}"), name)


def test_a_package_that_nothing_chosen_needs_is_no_news(monkeypatch, tiny_prior):  # noqa: F811
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    prior = ["model=embedded", f"model.path={tiny_prior}"]
    assert "torch_xla" not in examine(*prior).out
    chosen = examine(*prior, "use_tpu=true")
    assert chosen.status == 1 and "problem  use_tpu=true: needs the package torch_xla" in chosen.out


def test_a_checkpoint_that_is_not_here_is_a_problem_with_its_command():
    outcome = examine("model=ffhq256ldm")
    assert outcome.status == 1
    assert "problem  cannot be loaded" in outcome.out and "-> bash download.sh ldm_ffhq256" in outcome.out


def test_a_prior_that_raises_is_a_problem(tiny_prior, monkeypatch):  # noqa: F811
    monkeypatch.setattr("particledaps.doctor.prior.demo_images", lambda *shape: 1 / 0)
    outcome = examine("model=embedded", f"model.path={tiny_prior}")
    assert outcome.status == 1 and "fails at work: ZeroDivisionError" in outcome.out


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["model=nowhere"], "allowed are"),
        (["modle=cats64"], "did you mean model"),
        (["cats64"], "is no override"),
        (["num_samples=0"], "num_samples=0"),
        (["--quick"], "unrecognized"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_sentence(arguments, words):
    outcome = examine(*arguments)
    assert outcome.status == 2 and outcome.out == "" and words in outcome.err and "Traceback" not in outcome.err


def test_a_missing_package_is_reported_before_anything_is_imported(monkeypatch):
    def version(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation.metadata, "version", version)
    monkeypatch.setattr(doctor, "read_settings", lambda overrides: pytest.fail("went on without its packages"))
    outcome = examine()
    assert outcome.status == 1 and "problem  torch is not installed" in outcome.out and "make setup" in outcome.out
