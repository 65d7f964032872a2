"""A run's identity over versions: keys come, defaults change."""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import posterior_sample  # noqa: F401 (registers the schema)
from particledaps.checks import SettingsError
from particledaps.runs.folder import RunFolder
from particledaps.settings.command_line import compose_config
from particledaps.settings.family import followed_config
from particledaps.settings.fingerprint import changed_keys, config_sha256, identity
from particledaps.settings.keys import facts
from run_settings import RunSettings, follow_family

STORED = yaml.safe_load((Path(__file__).parents[1] / "stored" / "config_2b9fc01.yaml").read_text())
SHA256_2B9FC01 = "e9ef9572363fad8adbecc8c06f7108b84a2fefb500d67c5f70b59ddcec9d5dbf"
"""What commit 2b9fc01 itself wrote into metrics.json beside that configuration."""
QUICK = ["num_samples=1", "sampler.annealing.num_steps=3", "sampler.mcmc.num_steps=3"]


def today(*overrides):
    config = compose_config("config", [*QUICK, *overrides])
    settings = follow_family(OmegaConf.to_object(config))
    return followed_config(OmegaConf.to_container(config, resolve=True), settings.model, settings.sampler)


def test_a_run_stored_by_an_earlier_version_is_the_same_run_today():
    """Fails for a key that was added without a neutral value, and for a default that changed."""
    assert today().keys() >= STORED.keys() and today() != STORED
    assert changed_keys(STORED, today()) == []
    assert config_sha256(STORED) == config_sha256(today()) == SHA256_2B9FC01


@pytest.mark.parametrize("override", ["name=x", "save_dir=x", "device=cpu", "data.start_id=1", "data.end_id=2"])
def test_what_cannot_change_a_number_is_no_part_of_it(override):
    assert config_sha256(today(override)) == SHA256_2B9FC01


@pytest.mark.parametrize(
    "override", ["task.origin=corner", "task.measurement=intensity", "data.bit_depth=12", "model.class_id=3", "seed=1"]
)
def test_a_new_key_counts_once_it_says_something_new(override):
    assert changed_keys(STORED, today(override)) == [override.partition("=")[0]]


def test_a_changed_default_is_refused_by_name(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(STORED))
    RunFolder(str(tmp_path), "run", today())
    changed = copy.deepcopy(today())
    changed["sampler"]["ode"]["solver"] = "heun"  # as if the default were another one
    with pytest.raises(SettingsError, match=r"differs in sampler\.ode\.solver"):
        RunFolder(str(tmp_path), "run", changed)


@dataclass
class Later:
    """A schema in which ``new`` came later, with a default that changes the behaviour."""

    seed: int = 42
    new: int = field(default=5, metadata=facts(neutral=3))
    required: int = 0


def test_a_missing_key_counts_as_its_neutral_value_not_as_its_default():
    stored = {"seed": 42, "required": 0}
    assert identity(stored, Later) == identity(stored | {"new": 3}, Later)
    assert identity(stored, Later) != identity(stored | {"new": 5}, Later)
    assert identity({"seed": 42}, Later) != identity(stored, Later)  # no neutral value: it must be there


def test_values_for_other_families_of_priors_may_come_and_go():
    config = today()
    entry = config["task"]["mcmc"]["sd"]
    grown = copy.deepcopy(config)
    grown["task"]["mcmc"]["fashion32"] = copy.deepcopy(entry)
    assert config_sha256(grown) == SHA256_2B9FC01
    own = copy.deepcopy(config)
    own["task"]["mcmc"]["cats64"]["momentum"] = 0.5
    assert changed_keys(config, own) == ["task.mcmc.cats64.momentum"]


def test_every_key_has_a_place_in_the_stored_run_or_a_neutral_value():
    """The test above by name, so that whoever adds a key learns which."""
    plain = OmegaConf.to_container(OmegaConf.structured(RunSettings))
    for group in (None, "data", "model", "task", "compat"):
        mine, theirs = (c if group is None else c[group] for c in (plain, STORED))
        added = {k: v for k, v in mine.items() if k not in theirs}
        kept = identity(added if group is None else {group: added})
        assert not (kept if group is None else kept[group]), kept
