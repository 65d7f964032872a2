"""Magnitudes in another convention: refused with the key that reads them, and with it the right numbers."""

import numpy as np
import pytest


@pytest.fixture
def measured(tiny_run, tmp_path):
    """The amplitudes ``(1, 3, 24, 24)`` of a run, and a function that reconstructs a file of them in another shape."""
    assert tiny_run("data.end_id=1", "name=source").status == 0
    y = np.load(tiny_run.save_dir / "source" / "floats" / "00000.npz")["y"].clip(0)

    def run(values, *more):
        np.savez(tmp_path / "y.npz", y=values)
        return tiny_run("data.dir=null", f"data.measurement={tmp_path / 'y.npz'}", *more)

    return y, run


def floats(tiny_run):
    return np.load(tiny_run.folder / "floats" / "00000.npz")


SHIFTED = {
    "corner": (lambda y: np.fft.ifftshift(y, axes=(-2, -1)), ["task.origin=corner"]),
    "squared": (np.square, ["task.measurement=intensity"]),
    "both": (
        lambda y: np.fft.ifftshift(y, axes=(-2, -1)) ** 2,
        ["task.measurement=intensity", "task.origin=corner"],
    ),
}


@pytest.mark.parametrize(("change", "keys"), SHIFTED.values(), ids=SHIFTED)
def test_another_convention_is_refused_by_name_and_read_with_its_key(measured, tiny_run, sampled, change, keys):
    y, run = measured
    refused = run(change(y))
    assert refused.status == 2 and sampled == []
    assert "no image in [0, 1] has these Fourier magnitudes" in refused.err and all(k in refused.err for k in keys)
    assert run(change(y), *keys).status == 0
    read = floats(tiny_run)
    assert np.allclose(read["y"], y, atol=1e-6)
    assert run(y, "name=plain").status == 0
    plain = np.load(tiny_run.save_dir / "plain" / "floats" / "00000.npz")["estimates"]
    assert np.allclose(read["estimates"], plain, atol=1e-3)


@pytest.mark.parametrize(("factor", "words"), [(24, "a division by 24"), (255, "scale 0 to 255")])
def test_another_scale_is_refused_with_the_factor(measured, factor, words):
    y, run = measured
    outcome = run(factor * y)
    assert outcome.status == 2 and words in outcome.err and "multiply y by" in outcome.err


def test_counts_are_refused_with_both_remedies(measured):
    y, run = measured
    outcome = run(np.random.default_rng(0).poisson(1000 * y**2))
    assert outcome.status == 2
    assert "task.measurement=intensity" in outcome.err and "multiply y by" in outcome.err


def test_what_a_run_saved_says_its_own_convention(tiny_run, measured):
    source = tiny_run.save_dir / "source" / "floats" / "00000.npz"
    with np.load(source) as arrays:
        assert (str(arrays["measurement"]), str(arrays["origin"])) == ("amplitude", "centre")
    outcome = tiny_run("data.dir=null", f"data.measurement={source}", "task.origin=corner")
    assert outcome.status == 2 and "says that it holds amplitude, frequency 0 in the centre" in outcome.err
    assert tiny_run("data.dir=null", f"data.measurement={source}").status == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task.origin=middle", "task.origin=middle: allowed are centre, corner"),
        ("task.measurement=power", "task.measurement=power: allowed are amplitude, intensity"),
        ("task.origin=corner", "task.origin=corner: describes the file data.measurement, and there is none"),
    ],
)
def test_keys_that_would_be_ignored_are_refused(tiny_run, override, words):
    outcome = tiny_run(override)
    assert outcome.status == 2 and words in outcome.err


def test_other_tasks_have_no_such_convention(tiny_run, tmp_path):
    np.savez(tmp_path / "y.npz", y=np.zeros((1, 3, 4, 4)))
    arguments = ("task=down_sampling", "data.dir=null", f"data.measurement={tmp_path / 'y.npz'}")
    outcome = tiny_run(*arguments, "task.measurement=intensity")
    assert outcome.status == 2 and "only for task=phase_retrieval" in outcome.err
