"""Every file in ``configs/`` composes, passes the checks and becomes objects."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import posterior_sample  # noqa: F401 (registers the schema)
import train_prior  # noqa: F401 (registers the schema)
from particledaps.checks import SettingsError
from particledaps.operators.operator import Operator
from particledaps.settings.build import build_operator
from particledaps.settings.command_line import CONFIG_DIR, compose_config
from particledaps.settings.schema import CompatSettings
from particledaps.settings.tasks import operator_of_image
from particledaps.training.settings import TrainingSettings
from particledaps.training.settings import validate as validate_training
from plan import loop_settings
from run_settings import RunSettings, follow_family, resolve_chain, validate

NEEDS = {
    "data/folder": ["data.dir=images"],
    "data/npz": ["data.path=images.npz"],
    "model/embedded": ["model.path=prior"],
    "model/custom": ["model.target=mine:prior"],
    "model/diffusers": ["model.path=owner/name", "model.family=sd"],
    "task/custom": ["task.target=particledaps.operators.phase_retrieval:PhaseRetrieval", "+task.options.oversample=4"],
}


def options(group):
    return sorted(p.stem for p in (CONFIG_DIR / group).glob("*.yaml"))


EVERY = [f"{p.parent.name}/{p.stem}" for p in sorted(CONFIG_DIR.glob("*/*.yaml")) if p.parent.name != "hydra"]


def settings(*overrides):
    return OmegaConf.to_object(compose_config("config", list(overrides)))


@pytest.mark.parametrize("option", EVERY)
def test_option(option):
    group, name = option.split("/")
    run = settings(f"{group}={name}", *NEEDS.get(option, []))
    assert isinstance(run, RunSettings)
    validate(run)
    sampler, run = loop_settings(run), follow_family(run)
    assert sampler.path[0] == run.sampler.annealing.sigma_max and sampler.path[-1] == 0
    assert sampler.num_levels == run.sampler.annealing.num_steps
    chain = resolve_chain(run)
    assert (sampler.chain.kernel, sampler.chain.num_steps, sampler.tau) == (chain.kernel, chain.num_steps, chain.tau)
    inner = sampler.inner_path(3.0)
    assert len(inner) == run.sampler.ode.num_steps + 1 and inner[0] == 3
    assert inner[-1] == (run.sampler.ode.sigma_min if run.compat.inner_end == "sigma_min" else 0)
    if run.task.kind == "nonlinear_blur":
        with pytest.raises(SettingsError, match=r"GOPRO_wVAE\.pth.*download\.sh"):
            build_operator(run.task)
        return
    operator = operator_of_image(build_operator(run.task), run.seed, 0, (3, 16, 16))
    assert isinstance(operator, Operator)
    y = operator.measure(torch.zeros(1, 3, 16, 16), torch.Generator().manual_seed(0))
    assert y.shape[1:] == operator.measurement_shape((3, 16, 16))


def test_the_files_are_all_there():
    assert {"data", "model", "task", "sampler", "compat"} <= {option.split("/")[0] for option in EVERY}
    assert "latent_daps_small" in options("sampler") and "latent_daps_hmc" in options("sampler")


@pytest.mark.parametrize("sampler", options("sampler"))
@pytest.mark.parametrize("family", ["pixel", "ldm", "sd", "cats64"])
def test_every_sampler_fits_every_family(sampler, family):
    validate(settings(f"sampler={sampler}", f"model.family={family}"))


def test_the_default_sampler_calls_the_decoder_at_most_900_times():
    run = follow_family(settings())
    assert run.sampler.annealing.num_steps * resolve_chain(run).num_steps <= 900


DAPS = {
    "timestep_map": ("vp", "native"),
    "ema": (False, True),
    "likelihood_half": (False, True),
    "gradient_clamp": (1.0, None),
    "quantize_in_decode": (True, False),
    "inner_end": ("sigma_min", "zero"),
    "ratio_counts_end": (True, False),
}


def test_compat_daps_sets_every_switch():
    assert vars(settings("compat=daps").compat) == {key: daps for key, (daps, _) in DAPS.items()}
    assert vars(settings().compat) == vars(CompatSettings()) == {key: ours for key, (_, ours) in DAPS.items()}


@pytest.mark.parametrize("key", DAPS)
def test_each_switch_of_compat_daps_can_be_overridden(key):
    ours = DAPS[key][1]
    value = {None: "null", True: "true", False: "false"}.get(ours, ours)
    compat = settings("compat=daps", f"compat.{key}={value}").compat
    assert vars(compat) == {k: ours if k == key else daps for k, (daps, _) in DAPS.items()}


def test_compat_reaches_the_sampler():
    ours, daps = (loop_settings(settings(f"compat={c}")) for c in ("none", "daps"))
    assert (ours.likelihood_half, ours.gradient_clamp, ours.ratio_counts_end) == (True, None, False)
    assert (daps.likelihood_half, daps.gradient_clamp, daps.ratio_counts_end) == (False, 1.0, True)
    last = ours.num_levels - 1
    assert ours.step_size(last) == pytest.approx(ours.chain.step_size * ours.step_size_min_ratio)
    assert daps.step_size(last) > ours.step_size(last)


def test_an_experiment_can_be_overridden():
    for name in options("experiment"):
        assert settings(f"experiment={name}").name == name
        assert settings(f"experiment={name}", "name=mine", "seed=7").name == "mine"


def test_training_configuration():
    training = OmegaConf.to_object(compose_config("train_prior", ["images=folder"]))
    assert training == TrainingSettings(images="folder")
    validate_training(training)


def test_nothing_shipped_names_the_shared_folder():
    root = Path(CONFIG_DIR).parent
    shipped = [
        *CONFIG_DIR.rglob("*.yaml"),
        *root.glob("*.py"),
        *root.rglob("particledaps/**/*.py"),
        *root.glob("README.md"),
    ]
    assert [p.name for p in shipped if "../shared" in p.read_text()] == []
