"""Every key of a training is checked before any work: the message names the key, the value and what is allowed."""

import math
from dataclasses import fields, is_dataclass

import pytest

from particledaps.checks import SettingsError
from particledaps.training.settings import TrainingSettings, validate

ABSURD = {
    int: [-1, 0, 10**12, 10**400],
    float: [math.nan, math.inf, -math.inf, -30.0],
    list: [[], [0], [-8], [8] * 9, [10**12]],
    str: ["", " ", "a\0b"],
}
FREE = {"source", "licence"}  # any text
ALLOWED = [("seed", 0), ("denoiser.attention_levels", 0)]


def keys(settings, prefix=""):
    """Dotted name, object that holds it and value of every key."""
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            yield from keys(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, settings, value


def settings(**values):
    return TrainingSettings(images="/pictures", **values)


ABSURDITIES = [
    (key, value)
    for key, _, default in keys(settings())
    for value in ABSURD.get(type(default), [])
    if key not in FREE and (key, value) not in ALLOWED
]


def refusal(configuration):
    with pytest.raises(SettingsError) as error:
        validate(configuration)
    return str(error.value)


def test_the_defaults_are_allowed():
    validate(settings())
    assert {key.rpartition(".")[2] for key, _ in ABSURDITIES} > {"channels", "norm_groups", "learning_rate", "images"}


@pytest.mark.parametrize(("key", "value"), ABSURDITIES, ids=lambda part: str(part)[:24])
def test_absurd_values(key, value):
    configuration = settings()
    owner = next(owner for name, owner, _ in keys(configuration) if name == key)
    setattr(owner, key.rpartition(".")[2], value)
    lines = refusal(configuration).splitlines()
    assert any(line.startswith(f"{key}=") and len(line) < 300 for line in lines), lines


TOGETHER = {
    "groups of the autoencoder": (
        {"autoencoder.norm_groups": 5},
        "autoencoder.norm_groups=5: must be at least 1 and divide every width of autoencoder.channels=[48,96]",
    ),
    "groups of the denoiser": (
        {"denoiser.channels": [64, 100]},
        "denoiser.norm_groups=16: must be at least 1 and divide every width of denoiser.channels=[64,100]",
    ),
    "heads of a level": (
        {"denoiser.head_channels": 48},
        "denoiser.head_channels=48: must divide the channels with attention (128, 128)",
    ),
    "heads of the middle": (
        {"denoiser.head_channels": 96, "denoiser.attention_levels": 0},
        "denoiser.head_channels=96: must divide the channels with attention (128)",
    ),
    "more attention than levels": (
        {"denoiser.attention_levels": 4},
        "denoiser.attention_levels=4: must be at least 0 and at most 3, the number of denoiser.channels",
    ),
    "levels and resolution": (
        {"resolution": 40},
        "resolution=40: must be a multiple of 16 (autoencoder.patch, halved at each further level of both networks)",
    ),
    "no levels": ({"denoiser.channels": []}, "denoiser.channels=[]: must be 1 to 8 widths"),
    "an average that stays": ({"denoiser.loop.ema_decay": 1.0}, "denoiser.loop.ema_decay=1: must be less than 1"),
    "a file for a folder": (
        {"export_dir": f"{__file__}/prior"},
        f"export_dir={__file__}/prior: {__file__} is no folder",
    ),
}


@pytest.mark.parametrize(("changes", "words"), TOGETHER.values(), ids=TOGETHER)
def test_values_that_do_not_go_together(changes, words):
    configuration = settings()
    for key, value in changes.items():
        owner = next(owner for name, owner, _ in keys(configuration) if name == key)
        setattr(owner, key.rpartition(".")[2], value)
    assert any(line.startswith(words) for line in refusal(configuration).splitlines())


def test_large_images_of_a_folder(tmp_path):
    configuration = TrainingSettings(images=str(tmp_path), large_images="large.npz")
    assert refusal(configuration).startswith("large_images=large.npz: only an .npz of small images takes it")


def test_every_problem_is_listed_at_once():
    configuration = settings(resolution=0, seed=-1, stages=[])
    assert [line.partition("=")[0] for line in refusal(configuration).splitlines()] == ["stages", "seed", "resolution"]
