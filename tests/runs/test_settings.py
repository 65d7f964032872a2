import copy
import math

import pytest
from omegaconf import OmegaConf

import posterior_sample  # noqa: F401 (registers the schema)
from particledaps.checks import SettingsError
from particledaps.settings.command_line import compose_config
from particledaps.settings.fingerprint import config_sha256
from particledaps.settings.schema import ChainConfig
from run_settings import resolve_chain, validate

IGNORED = {
    "name",
    "save_dir",
    "device",
    "gpu",
    "use_tpu",
    "save_trajectory",
    "on_error",
    "preset",  # what it fills is in the identity
    "data.start_id",
    "data.end_id",
}
WITHOUT_NULLS = "sampler=latent_daps_small"
CONFIG = compose_config(
    "config", [WITHOUT_NULLS, "sampler.annealing.sigma_min=0.1"]
)  # the range of each key leans on it
CONTAINER = OmegaConf.to_container(CONFIG, resolve=True)


def leaves(config, prefix=""):
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def changed(key):
    config = copy.deepcopy(CONTAINER)
    *parents, last = key.split(".")
    part = config
    for name in parents:
        part = part[name]
    part[last] = "another value"
    return config


def settings(**values):
    """The default settings with dotted keys replaced (``__`` for the dot)."""
    config = copy.deepcopy(CONFIG)
    for key, value in values.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    return OmegaConf.to_object(config)


@pytest.mark.parametrize("key", leaves(CONTAINER))
def test_hash_reacts_to_everything_that_changes_numbers(key):
    same = config_sha256(changed(key)) == config_sha256(CONTAINER)
    assert same == (key in IGNORED or key.startswith("task.mcmc.sd."))  # the default prior is of another family


def test_hash_of_the_ignored_keys_only_depends_on_what_exists():
    assert set(leaves(CONTAINER)) >= IGNORED
    shuffled = dict(reversed(CONTAINER.items()))
    assert config_sha256(shuffled) == config_sha256(CONTAINER)


def test_defaults_are_those_of_the_user():
    defaults = settings()
    validate(defaults)
    assert (defaults.seed, defaults.pruning_step, defaults.optimization_step) == (42, -1, -1)
    for name in ("num_samples", "repulsion_scale", "repulsion_sigma_break", "repulsion_schedule", "use_tpu"):
        assert hasattr(defaults, name)


EDGES = {
    "num_samples": (0, 1),
    "seed": (-1, 0),
    "gpu": (-1, 0),
    "task__oversample": (0.0, 0.1),
    "task__noise_sigma": (0.0, 1e-9),
    "sampler__annealing__num_steps": (0, 1),
    "sampler__ode__num_steps": (0, 1),
    "sampler__annealing__sigma_max": (0.1, 0.11),
    "sampler__ode__sigma_min": (0.1, 0.099),
    "sampler__mcmc__num_steps": (0, 1),
    "sampler__mcmc__step_size": (-1e-5, 1e-5),
    "sampler__mcmc__momentum": (1.0, 0.99),
    "sampler__mcmc__step_size_min_ratio": (1.01, 1.0),
    "sampler__mcmc__tau": (0.0, 1e-6),
    "sampler__mcmc__prior_sigma": (0.0, 1e-6),
    "sampler__mcmc__curvature_limit": (0.0, 0.1),
    "compat__gradient_clamp": (0.0, 0.1),
    "pruning_step": (-2, -1),
    "optimization_step": (1001, -1),
    "repulsion_scale": (-0.1, 0.0),
    "repulsion_sigma_break": (math.nan, 0.0),
    "repulsion_schedule": ("steps", "cosine"),
    "precision": ("float64", "bfloat16"),
    "compat__timestep_map": ("ddpm", "vp"),
    "compat__inner_end": ("end", "sigma_min"),
    "sampler__ode__schedule": ("karras", "ve"),
}


@pytest.mark.parametrize(("key", "outside", "inside"), [(k, *v) for k, v in EDGES.items()], ids=EDGES)
def test_range_of_each_key(key, outside, inside):
    validate(settings(**{key: inside}))
    with pytest.raises(SettingsError) as refused:
        validate(settings(**{key: outside}))
    first = str(refused.value).splitlines()[0]
    assert first.startswith(f"{key.replace('__', '.')}={outside}".removesuffix(".0"))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_problem_is_listed(count):
    bad = dict(list({k: v[0] for k, v in EDGES.items() if k.count("__") == 2}.items())[:count])
    with pytest.raises(SettingsError) as refused:
        validate(settings(**bad))
    for key in bad:
        assert key.replace("__", ".") in str(refused.value)


def test_chain_falls_back_to_the_values_of_the_family():
    for family, values in CONFIG.task.mcmc.items():
        empty = dict.fromkeys(("kernel", "num_steps", "step_size", "step_size_min_ratio", "momentum", "tau"))
        run = settings(model__family=family, sampler__mcmc=empty)
        validate(run)
        chain = resolve_chain(run)
        for key in empty:
            assert getattr(chain, key) == values[key]
        assert chain.prior == "gaussian"


def test_chain_of_the_sampler_wins_key_by_key():
    run = settings(model__family="pixel", sampler__mcmc__tau=None, sampler__mcmc__num_steps=7)
    chain = resolve_chain(run)
    assert chain.tau == CONFIG.task.mcmc.pixel.tau
    assert chain.num_steps == 7
    assert chain.kernel == CONFIG.sampler.mcmc.kernel != CONFIG.task.mcmc.pixel.kernel


def test_unknown_family_matters_only_where_a_value_is_missing():
    validate(settings(model__family="dogs"))
    with pytest.raises(SettingsError, match=r"sampler\.mcmc\.tau is not set .* model\.family=dogs \(it knows pixel"):
        validate(settings(model__family="dogs", sampler__mcmc__tau=None))


def test_a_configuration_file_can_add_a_family():
    own = {"kernel": "mh", "num_steps": 3, "step_size": 0.1, "step_size_min_ratio": 0.5, "momentum": 0.0, "tau": 0.2}
    config = compose_config("config", ["model.family=dogs", "sampler=latent_daps"])
    OmegaConf.set_struct(config, False)
    run = OmegaConf.to_object(OmegaConf.merge(config, {"task": {"mcmc": {"dogs": own}}}))
    validate(run)
    assert resolve_chain(run) == ChainConfig("mh", 3, 0.1, 0.5, 0.0, 0.2)
