"""Conditions per call and guidance as a prior that wraps a prior."""

from dataclasses import replace

import pytest
import torch
from tiny import DENOISER, write_tiny_prior

from particledaps.priors.checkpoint import load_checkpoint
from particledaps.priors.conditioning import guided, tell
from particledaps.priors.diffusers_folder import LoadOptions, open_folder
from particledaps.priors.embedded import load_embedded, save_embedded
from particledaps.priors.errors import PriorError
from particledaps.priors.prior import in_bfloat16
from particledaps.settings.schema import ModelSettings
from particledaps.training import denoiser as stage_two
from particledaps.training.denoiser import LatentFacts


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A prior of three classes, as train_prior.py exports it."""
    folder = tmp_path_factory.mktemp("classes") / "prior"
    plain = load_embedded(write_tiny_prior(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        latents = LatentFacts((4, 4, 4), (4,), 1.0, num_classes=3)
        network = stage_two.build(DENOISER, latents)
    denoiser = stage_two.wrap(network, DENOISER, latents)
    save_embedded(folder, plain.autoencoder, denoiser, {"name": "tiny", "class_names": ["a", "b", "c"]})
    return load_embedded(folder)


def loaded(checkpoints, name):
    folder = open_folder(str(checkpoints[name]), checkpoints[name].parent)
    return load_checkpoint(folder, "diffusers", LoadOptions())


@pytest.fixture(params=["embedded", "ldm_imagenet", "stable_diffusion"])
def prior(request, checkpoints, embedded):
    return embedded if request.param == "embedded" else loaded(checkpoints, request.param)


def conditions_of(prior):
    """A condition, another one, and the null condition."""
    return ("a cat", "", "") if prior.conditions.kind == "prompt" else (1, 2, prior.conditions.null)


def test_a_condition_is_given_per_call(prior):
    one, other, null = conditions_of(prior)
    z = normal(2, *prior.latent_shape)
    with torch.no_grad():
        toward, away = (prior.conditioned(c).denoiser(z, 1.0) for c in (one, other))
        again = prior.conditioned(other).conditioned(one).denoiser(z, 1.0)
        free = prior.conditioned(None).denoiser(z, 1.0)
        assert torch.equal(again, toward) and not torch.allclose(toward, away, atol=1e-5)
        assert torch.equal(free, prior.conditioned(null).denoiser(z, 1.0))
        assert torch.equal(prior.denoiser(z, 1.0), free)  # loaded as the null condition says


def test_guided_at_0_and_1_and_with_the_condition_as_negative(prior):
    one, other, _ = conditions_of(prior)
    z = normal(2, *prior.latent_shape)
    with torch.no_grad():
        toward, away = (prior.conditioned(c).denoiser(z, 1.0) for c in (one, other))
        assert torch.equal(guided(prior, one, 0.0, other).denoiser(z, 1.0), away)
        assert torch.equal(guided(prior, one, 1.0, other).denoiser(z, 1.0), toward)
        assert torch.allclose(guided(prior, one, 6.0, one).denoiser(z, 1.0), toward, atol=1e-5)
        assert torch.allclose(guided(prior, one, 3.0, other).denoiser(z, 1.0), 3 * toward - 2 * away, atol=1e-4)
        outside = guided(prior, one, 3.0, other, interval=(2.0, 3.0)).denoiser(z, 1.0)
        assert torch.equal(outside, toward)


def test_labels_for_records(embedded):
    label = guided(embedded, 1, 3.0, 2).condition
    assert label == "class 1, guidance 3" and embedded.conditioned(2).condition == "class 2"
    asked = ModelSettings(class_id=1, guidance_scale=3.0)
    assert tell(embedded, asked).condition == "class 1"  # as stored runs have it
    more = replace(asked, negative_class_id=2, guidance_rescale=0.5, guidance_interval=[0.5, 2.0])
    assert tell(embedded, more).condition == "class 1, guidance 3, negative 2, rescale 0.5, interval [0.5, 2.0]"
    assert tell(embedded, ModelSettings()).condition == "class 3"


def test_the_keys_are_guided(embedded):
    z = normal(2, *embedded.latent_shape)
    asked = ModelSettings(
        class_id=1, guidance_scale=3.0, negative_class_id=0, guidance_rescale=0.7, guidance_interval=[0.5, 2.0]
    )
    by_keys, by_hand = tell(embedded, asked), guided(embedded, 1, 3.0, 0, 0.7, (0.5, 2.0))
    for sigma in (0.1, 1.0, 2.0):
        assert torch.equal(by_keys.denoiser(z, sigma), by_hand.denoiser(z, sigma))
    assert not torch.allclose(by_keys.denoiser(z, 1.0), embedded.denoiser(z, 1.0), atol=1e-3)


def test_another_arithmetic_keeps_the_conditions(embedded):
    z, coarse = normal(2, *embedded.latent_shape), in_bfloat16(embedded)
    for condition in (0, 2):
        fine = embedded.conditioned(condition).denoiser(z, 1.0)
        assert torch.allclose(coarse.conditioned(condition).denoiser(z, 1.0), fine, atol=5e-2)


def test_a_custom_prior_is_guided_by_the_same_keys(embedded, monkeypatch):
    import sys
    import types

    from particledaps.settings.build import build_prior
    from particledaps.settings.schema import CompatSettings

    module = types.ModuleType("my_classes")
    module.build = lambda device, compat: embedded
    monkeypatch.setitem(sys.modules, "my_classes", module)
    asked = ModelSettings(kind="custom", path=None, target="my_classes:build", class_id=1, guidance_scale=3.0)
    prior = build_prior(asked, CompatSettings(), "float32", None, torch.device("cpu"))
    z = normal(2, *embedded.latent_shape)
    assert torch.equal(prior.denoiser(z, 1.0), guided(embedded, 1, 3.0).denoiser(z, 1.0))


def test_checksums_of_stored_runs_name_the_guided_networks(embedded):
    names = guided(embedded, 1, 3.0).denoiser.state_dict()
    assert {name.split(".")[0] for name in names} == {"conditional", "unconditional"}


def test_names_of_the_classes(embedded):
    assert embedded.conditions.names == ("a", "b", "c") and embedded.conditions.count == 4


def test_what_cannot_be(checkpoints, embedded, tiny_prior):
    plain, text = load_embedded(tiny_prior), loaded(checkpoints, "stable_diffusion")
    refused = [
        (lambda: plain.conditioned(1), "tiny is unconditional"),
        (lambda: guided(plain, 1, 2.0), "tiny is unconditional, which cannot be guided"),
        (lambda: embedded.conditioned("a cat"), "'a cat' is no class, which is what tiny takes"),
        (lambda: guided(embedded, 1, 2.0, "a dog"), "'a dog' is no class"),
        (lambda: guided(text, "a cat", 2.0, 3), "3 is no prompt, which is what"),
        (lambda: embedded.conditioned(4), "model.class_id=4: tiny knows the classes 0 to 3"),
        (
            lambda: guided(embedded, 1, 2.0, interval=(3.0, 1.0)),
            r"guidance_interval=\[3.0, 1.0\]: must be \[low, high\]",
        ),
        (lambda: tell(plain, ModelSettings(guidance_scale=2.0)), "guidance_scale=2.0: tiny holds an unconditional"),
        (lambda: tell(plain, ModelSettings(guidance_interval=[1.0, 2.0])), "tiny holds an unconditional network"),
        (lambda: tell(embedded, ModelSettings(class_id=1, prompt="a cat")), "prompt='a cat': tiny holds no network"),
        (
            lambda: tell(embedded, ModelSettings(class_id=1, guidance_scale=2.0, negative_prompt="a")),
            "negative_prompt='a': tiny holds no network that takes a text",
        ),
        (lambda: tell(embedded, ModelSettings(negative_class_id=1)), "changes nothing at model.guidance_scale=1"),
        (lambda: tell(embedded, ModelSettings(guidance_rescale=0.7)), "changes nothing at model.guidance_scale=1"),
    ]
    for call, fragment in refused:
        with pytest.raises(PriorError, match=fragment):
            call()
