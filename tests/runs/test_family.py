"""The sampler follows the prior's family; whatever is said explicitly wins."""

import pytest
from omegaconf import OmegaConf
from tiny_checkpoints import checkpoints  # noqa: F401 (fixture)

import posterior_sample  # noqa: F401 (registers the schema)
from particledaps.checks import SettingsError
from particledaps.settings.command_line import compose_config
from particledaps.settings.family import followed_config
from particledaps.settings.fingerprint import config_sha256
from plan import loop_settings
from run_settings import follow_family, resolve_chain, validate

ANNEALING = {"pixel": (200, 100.0, 0.1), "ldm": (50, 10.0, 0.1), "sd": (50, 10.0, 0.1)}
INNER = {"pixel": (5, 0.01), "ldm": (2, 0.001), "sd": (2, 0.001)}
MCMC = {  # DAPS, configs/task/phase_retrieval.yaml
    "pixel": ("langevin", 100, 5e-5, 0.01, 0.0),
    "ldm": ("hmc", 65, 2.1e-5, 0.12, 0.41),
    "sd": ("hmc", 95, 1.1e-4, 0.027, 0.47),
}
MODELS = {
    "ffhq256ddpm": "pixel",
    "imagenet256ddpm": "pixel",
    "ffhq256ldm": "ldm",
    "imagenet256ldm": "ldm",
    "stable-diffusion-v1.5": "sd",
    "stable-diffusion-v2.1": "sd",
}


def settings(*overrides):
    return OmegaConf.to_object(compose_config("config", list(overrides)))


def annealing(run):
    part = follow_family(run).sampler.annealing
    return part.num_steps, part.sigma_max, part.sigma_min


def inner(run):
    part = follow_family(run).sampler.ode
    return part.num_steps, part.sigma_min


@pytest.mark.parametrize(("model", "family"), MODELS.items())
def test_naming_the_model_is_enough(model, family):
    run = settings(f"model={model}", "task=phase_retrieval")
    validate(run)
    assert (annealing(run), inner(run)) == (ANNEALING[family], INNER[family])
    chain = resolve_chain(run)
    found = chain.kernel, chain.num_steps, chain.step_size, chain.step_size_min_ratio, chain.momentum
    assert found == MCMC[family]
    assert chain.tau == pytest.approx(0.01 / 2**0.5)
    built = loop_settings(run)
    assert (built.num_levels, built.path[0].item()) == ANNEALING[family][:2]


def test_compat_daps_writes_its_own_tau():
    assert resolve_chain(settings("model=ffhq256ddpm", "compat=daps")).tau == 0.01


def test_a_key_of_the_command_line_wins():
    run = settings("model=ffhq256ddpm", "sampler.annealing.num_steps=7", "sampler.mcmc.num_steps=3")
    assert annealing(run) == (7, 100.0, 0.1)
    assert (resolve_chain(run).num_steps, resolve_chain(run).step_size) == (3, 5e-5)


@pytest.mark.parametrize("choice", ["sampler=latent_daps_small", "experiment=fork_nominal"])
def test_a_chosen_sampler_and_an_experiment_win(choice):
    plain, run = settings(choice), settings("model=ffhq256ddpm", choice)
    assert run.sampler == plain.sampler
    assert follow_family(run).sampler == run.sampler


@pytest.mark.parametrize("family", ANNEALING)
def test_a_custom_prior_says_its_family(family):
    run = settings("model=custom", "model.target=mine:prior", f"model.family={family}")
    assert (annealing(run), resolve_chain(run).num_steps) == (ANNEALING[family], MCMC[family][1])


def test_a_custom_prior_without_family_gets_the_small_sampler():
    run, small = settings("model=custom", "model.target=mine:prior"), settings("sampler=latent_daps_small")
    assert follow_family(run).sampler == small.sampler


FAMILIES = {"ldm_ffhq": "ldm", "ldm_imagenet": "ldm", "adm": "pixel", "ddpm": "pixel", "stable_diffusion": "sd"}


@pytest.mark.parametrize(("name", "family"), FAMILIES.items())
def test_the_family_of_a_folder_is_seen_from_it(checkpoints, name, family):  # noqa: F811
    run = settings("model=diffusers", f"model.path={checkpoints[name]}")
    assert run.model.family is None
    validate(run)
    assert follow_family(run).model.family == family
    assert annealing(run) == ANNEALING[family]
    told = settings("model=diffusers", f"model.path={checkpoints[name]}", "model.family=cats64")
    assert follow_family(told).model.family == "cats64"


def test_following_twice_changes_nothing():
    once = follow_family(settings("model=ffhq256ddpm"))
    assert follow_family(once) == once
    assert once.sampler.families == {}
    plain = settings("sampler=latent_daps_small")
    assert follow_family(plain) == plain
    assert follow_family(settings()) == plain


@pytest.mark.parametrize("model", ["custom", "ffhq256ldm"])
def test_an_unknown_family_is_told(model):
    with pytest.raises(SettingsError, match=r"annealing\.schedule is not set .*family=dogs \(it knows pixel"):
        validate(settings(f"model={model}", "model.target=mine:prior", "model.family=dogs"))


def test_the_hash_knows_the_values_and_not_the_way_to_them():
    def hashed(*overrides):
        config = compose_config("config", list(overrides))
        own = follow_family(OmegaConf.to_object(config))
        return config_sha256(followed_config(OmegaConf.to_container(config), own.model, own.sampler))

    custom = ("model=custom", "model.target=mine:prior")
    assert hashed(*custom) == hashed(*custom, "sampler=latent_daps_small")
    assert hashed(*custom) != hashed(*custom, "model.family=ldm")
    assert hashed("model=ffhq256ldm") != hashed("model=ffhq256ldm", "model.class_id=3")


def test_keys_at_their_defaults_leave_the_hash_as_it_was():
    config = OmegaConf.to_container(compose_config("config", ["sampler=latent_daps_small"]))
    older = {k: v for k, v in config.items() if k not in ("model", "sampler", "task")}
    older["model"] = {k: config["model"][k] for k in ("kind", "path", "target", "options", "family")}
    older["sampler"] = {k: config["sampler"][k] for k in ("annealing", "ode", "mcmc")}
    older["task"] = config["task"] | {"mcmc": {k: v for k, v in config["task"]["mcmc"].items() if k != "sd"}}
    assert config_sha256(older) == config_sha256(config)
    changed = config | {"model": config["model"] | {"class_id": 3}}
    assert config_sha256(changed) != config_sha256(config)
