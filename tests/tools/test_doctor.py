"""tools/doctor.py: exit status, and that its report names what to do."""

from importlib import metadata

import pytest
from tiny import captured, no_lpips, tiny_prior  # noqa: F401 (fixtures)

from runs import installation
from tools import doctor


def examine(*arguments):
    return captured(lambda: doctor.main([*map(str, arguments), "device=cpu"]))


@pytest.fixture(autouse=True)
def no_weights(monkeypatch, tmp_path):
    """No downloaded file, so that a developer's own change nothing."""
    monkeypatch.setenv("PARTICLEDAPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("runs.weight_checks.dino_finding", lambda *asked: installation.Finding("note", "no dino"))


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


def test_a_checkpoint_that_is_not_here_is_a_problem_with_its_command():
    outcome = examine("model=ffhq256ldm")
    assert outcome.status == 1
    assert "problem  cannot be loaded" in outcome.out and "-> bash download.sh ldm_ffhq256" in outcome.out


def test_a_prior_that_raises_is_a_problem(tiny_prior, monkeypatch):  # noqa: F811
    monkeypatch.setattr("runs.prior_checks.demo_images", lambda *shape: 1 / 0)
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
