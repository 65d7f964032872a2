"""Text arrives as it was typed, whatever Hydra's grammar would make of it."""

import pytest
from omegaconf import OmegaConf

import posterior_sample  # noqa: F401 (registers the schema)
import train_prior  # noqa: F401
from particledaps.settings.command_line import compose_config, literal
from particledaps.settings.text_keys import quote_text, text_keys
from run_settings import RunSettings

TYPED = [
    "12e4567",
    "1.10",
    "01",
    "1e3",
    "true",
    "True",
    "inf",
    "nan",
    "a'b",
    'a"b',
    "a\\",
    "a\\'b",
    "[x",
    "(y",
    "ä=,#~",
]
TYPED += ["{a:b}", "a b", "$HOME", "x: y", "epoch=3,best", "C:\\cats", "~/cats", "@x", "null and void", "''", "+"]


@pytest.mark.parametrize("typed", TYPED)
def test_text_stays_text(typed):
    config = compose_config("config", [f"name={typed}", f"data.dir={typed}", "data=folder"])
    wanted = "" if typed == "''" else typed  # quoted already
    assert (config.name, config.data.dir) == (wanted, wanted)


def test_null_stays_null_where_a_key_may_be_null():
    config = compose_config("config", ["data.dir=null", "name=null"])
    assert config.data.dir is None and config.name == "null"


def test_references_and_quotes_still_work():
    config = compose_config("config", ["name=s_${seed}", "save_dir='a b'"])
    assert (config.name, config.save_dir) == ("s_42", "a b")


def test_numbers_stay_numbers():
    config = compose_config("config", ["seed=7", "task.noise_sigma=1e-1", "restart_sigmas=[1,2]"])
    assert (config.seed, config.task.noise_sigma, list(config.restart_sigmas)) == (7, 0.1, [1.0, 2.0])


def test_text_in_tables_and_of_a_training():
    assert compose_config("config", ["task.mcmc.cats64.kernel=1.0"]).task.mcmc.cats64.kernel == "1.0"
    assert compose_config("train_prior", ["images=1.10", "name=1e5"]).images == "1.10"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("name=a,1.10", "name='a','1.10'"),
        ("name=s_${seed}", "name='s_${seed}'"),
        ("name='a,b',c", "name='a,b','c'"),
        ("name=choice(a,b)", "name=choice(a,b)"),
        ("seed=1,2", "seed=1,2"),
    ],
)
def test_a_sweep_divides_at_commas(argument, expected):
    assert quote_text(["-m", argument], RunSettings) == ["-m", expected]


def test_a_sweep_may_be_asked_for_in_other_words():
    assert quote_text(["name=a,1.10", "hydra.mode=MULTIRUN"], RunSettings, sweep=True)[0] == "name='a','1.10'"
    assert quote_text(["name=a,1.10"], RunSettings) == ["name='a,1.10'"]


def test_options_and_deletions_are_left_alone():
    arguments = ["--help", "~data", "-m", "--config-name=name", "model=cats64", "+task.options.x=1.0"]
    assert literal("config", arguments) == arguments


def test_every_text_key_of_the_configuration_is_known():
    found = dict(text_keys(RunSettings))
    assert {"name", "save_dir", "data.dir", "data.measurement", "model.path", "task.mcmc.*.kernel"} <= set(found)
    assert found["data.dir"] and not found["name"]
    plain = OmegaConf.to_container(compose_config("config", []))
    texts = {k for k, v in plain.items() if isinstance(v, str)}
    assert texts <= set(found)
