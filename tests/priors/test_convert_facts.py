"""What the tensors of a checkpoint do not tell: from the file, an option or a published model, or it is asked for."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from original_layouts import (
    ADM_FFHQ,
    ARCHITECTURES,
    LDM_IMAGENET,
    LINEAR,
    VQ,
    FirstStage,
    UNet,
    checkpoints,
    first_stage_shapes,
    latent_checkpoint,
    prefixed,
    random_weights,
    schedule_buffers,
    unet_shapes,
)
from original_networks import run_unet

import particledaps.priors.conversion.convert
from particledaps.priors.cards import read_cards
from particledaps.priors.checkpoint import load_checkpoint
from particledaps.priors.conversion.convert import convert_checkpoint, read_card
from particledaps.priors.conversion.facts import Facts, Known, find_facts, is_published
from particledaps.priors.conversion.families import FAMILIES, recognise, strip
from particledaps.priors.conversion.mapping import shapes_of
from particledaps.priors.conversion.options import read_options
from particledaps.priors.conversion.parts import read_latent, read_layout, read_pixel
from particledaps.priors.conversion.schedule import published_schedule
from particledaps.priors.conversion.unet_mapping import Heads, unequal_heads
from particledaps.priors.diffusers_folder import LoadOptions, open_folder
from particledaps.priors.prior import PriorError

TIMES = torch.tensor([3.7, 812.0])
SMALL = {"image_size": 16, "num_head_channels": 32}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def convert(folder, state, architecture=None, **options):
    torch.save(state, folder / "model.pt")
    return convert_checkpoint(folder / "model.pt", folder / "out", architecture=architecture, **options)


def refusal(folder, state, architecture=None, **options):
    with pytest.raises(PriorError) as error:
        convert(folder, state, architecture, **options)
    assert str(error.value).startswith(f"{folder / 'model.pt'}: ") and "\n" not in str(error.value)
    assert not (folder / "out").exists()
    return str(error.value)


def load(folder, kind="diffusers", **options):
    return load_checkpoint(open_folder(str(folder / "out"), Path("/")), kind, LoadOptions(**options))


# --- the published models at full size, without storage --------------------------------------------------------------

PIXEL = {"updown": True, "scale_shift": True, "outputs": 6}
F4 = FirstStage((128, 256, 512), 2, (False,) * 3, 3, 8192)
F8 = FirstStage((128, 256, 512, 512), 2, (False,) * 4, 4, None)
LATENT_LEVELS = (False, True, True, True)
PUBLISHED = {
    "ldm_ffhq256": (UNet((224, 448, 672, 896), 2, LATENT_LEVELS), F4, None),
    "ldm_imagenet256": (UNet((192, 384, 576, 960), 2, LATENT_LEVELS, context=512), F4, 1001),
    "adm_ffhq256": (UNet((128, 128, 256, 256, 512, 512), 1, (False,) * 4 + (True, False), **PIXEL), None, None),
    "adm_imagenet256": (UNet((256, 256, 512, 512, 1024, 1024), 2, (False,) * 3 + (True,) * 3, **PIXEL), None, None),
}
OTHERS = {
    "lsun_churches256": (UNet((192, 384, 384, 768, 768), 2, (False, False, True, True, True)), F8, None),
    "ldm of another first stage": (PUBLISHED["ldm_ffhq256"][0], F8, None),
    "cin256": (
        UNet((256, 512, 1024), 2, (True,) * 3, context=512),
        FirstStage((128, 256, 512, 512), 2, (False,) * 4, 4, 16384),
        1000,
    ),
    "cin256-v2 without a null class": (*PUBLISHED["ldm_imagenet256"][:2], 1000),
    "adm, classes": (dataclasses.replace(PUBLISHED["adm_imagenet256"][0], classes=1000), None, None),
    "adm, three blocks": (dataclasses.replace(PUBLISHED["adm_ffhq256"][0], res_blocks=3), None, None),
    "adm, one more level": (
        dataclasses.replace(PUBLISHED["adm_ffhq256"][0], attention=(False,) * 3 + (True,) * 3),
        None,
        None,
    ),
}


def empty(unet, stage, rows):
    """A whole checkpoint on the meta device, with the noise schedule of latent diffusion."""
    pixel = stage is None
    shapes = unet_shapes(unet) if pixel else prefixed(unet_shapes(unet), "model.diffusion_model.")
    shapes |= {} if pixel else prefixed(first_stage_shapes(stage), "first_stage_model.")
    shapes |= {"cond_stage_model.embedding.weight": (rows, unet.context)} if rows else {}
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return state if pixel else state | schedule_buffers()


def facts_of(state, asked=None, by_checksum=False, **architecture):
    name = recognise(shapes_of(state), asked)
    layout = read_layout(state, FAMILIES[name])
    known = Known(name, asked is not None, is_published(layout, name), lambda: by_checksum)
    return name, layout, find_facts(layout, read_options(architecture), known)


def written(state, name, layout, facts):
    family = FAMILIES[name]
    read = read_latent(state, family, layout, facts, False) if family.latent else read_pixel(state, layout, facts)
    return read.unet.network.config


HEADS = {
    "ldm_ffhq256": Heads(32),
    "ldm_imagenet256": Heads(number=1),
    "adm_ffhq256": Heads(64),
    "adm_imagenet256": Heads(64),
}
HEAD_DIMS = {"ldm_ffhq256": 32, "ldm_imagenet256": (1,) * 4, "adm_ffhq256": 64, "adm_imagenet256": 64}
NULLS = {"ldm_imagenet256": 1000}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_known_without_options(name):
    """By its architecture and, for the betas of a pixel network, by the SHA-256 of its card."""
    state = empty(*PUBLISHED[name])
    found, layout, facts = facts_of(state, by_checksum=name.startswith("adm"))
    assert found == name and is_published(layout, name)
    published = published_schedule(FAMILIES[name])
    assert facts == Facts(HEADS[name], 256, published, "epsilon", NULLS.get(name), facts.origins)
    assert facts.origins["heads"] == facts.origins["image size"] == "its architecture"
    assert facts.origins["betas"] == ("its SHA-256" if name.startswith("adm") else "the file")
    config = written(state, name, layout, facts)
    assert config.attention_head_dim == HEAD_DIMS[name] and config.sample_size == (64 if "ldm" in name else 256)
    assert unequal_heads(layout.unet, facts.heads) is None


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_that_is_asked_for_by_name(name):
    state = {k: v for k, v in empty(*PUBLISHED[name]).items() if k != "betas"}
    _, _, facts = facts_of(state, asked=name)
    assert (facts.heads, facts.image_size, facts.null_class) == (HEADS[name], 256, NULLS.get(name))
    assert facts.schedule == published_schedule(FAMILIES[name])
    assert {facts.origins[fact] for fact in ("heads", "image size", "betas")} == {f"family {name}"}


@pytest.mark.parametrize("name", ["adm_ffhq256", "adm_imagenet256"])
def test_the_architecture_does_not_tell_the_betas_of_a_pixel_network(name):
    with pytest.raises(PriorError) as error:
        facts_of(empty(*PUBLISHED[name]))
    assert "do not tell its betas, and" in str(error.value) and "beta_schedule=" in str(error.value)
    assert "--family NAME if it is one (adm_ffhq256, adm_imagenet256)" in str(error.value)


@pytest.mark.parametrize("name", OTHERS)
def test_another_published_file_is_not_taken_for_one_of_the_four(name):
    state = empty(*OTHERS[name])
    with pytest.raises(PriorError) as error:
        facts_of(state)
    text = str(error.value)
    assert "num_heads=N or num_head_channels=N" in text and "image_size=N" in text
    assert ("null_class=INDEX|none" in text) == (OTHERS[name][2] is not None)
    assert ("beta_schedule=" in text) == (OTHERS[name][1] is None)


def test_two_published_files_with_the_right_options():
    state = empty(*OTHERS["lsun_churches256"])
    name, layout, facts = facts_of(state, num_heads=8, image_size=256)
    assert written(state, name, layout, facts).sample_size == 32 and unequal_heads(layout.unet, facts.heads) == 8
    state = empty(*OTHERS["cin256"])
    name, layout, facts = facts_of(state, num_head_channels=32, image_size=256, null_class="none")
    assert written(state, name, layout, facts).attention_head_dim == (8, 16, 32) and facts.null_class is None


def test_every_card_that_is_converted_names_its_family():
    cards = [card for card in read_cards().values() if card.becomes]
    assert {card.family for card in cards} == set(FAMILIES)
    for card in cards:
        schedule = published_schedule(FAMILIES[card.family])
        assert card.schedule.split()[0] == schedule["beta_schedule"]
        assert [float(v) for v in card.schedule.split()[1:3]] == [schedule["beta_start"], schedule["beta_end"]]


# --- small files -----------------------------------------------------------------------------------------------------

SAME_NUMBER = UNet((32, 64), 1, (True, True), num_heads=2)


@torch.no_grad()
@pytest.mark.parametrize("order", ["legacy", "new"])
def test_the_same_number_of_heads_at_unequal_widths(tmp_path, order):
    unet = dataclasses.replace(SAME_NUMBER, updown=True, scale_shift=True, outputs=6)
    state, x = random_weights(unet_shapes(unet), 4), normal(2, 3, 8, 8)
    card = convert(tmp_path, state, {"num_heads": 2, "image_size": 8, "attention_order": order, **LINEAR})
    wanted = run_unet(state, unet, x, TIMES, legacy=order == "legacy")[:, :3]
    network = load(tmp_path).denoiser.network.unet
    torch.testing.assert_close(network(x, TIMES).sample[:, :3], wanted, rtol=1e-5, atol=1e-5)
    assert card.num_heads == json.loads((tmp_path / "out" / "card.json").read_text())["num_heads"] == 2
    alone = UNet2DModel.from_pretrained(tmp_path / "out" / "unet")  # what diffusers' configuration can say
    assert (alone(x, TIMES).sample[:, :3] - wanted).abs().max() > 1e-3


@torch.no_grad()
def test_the_same_number_of_heads_in_latent_diffusion(tmp_path):
    state, z = latent_checkpoint(SAME_NUMBER, VQ), normal(2, 3, 8, 8)
    raw = strip(state, "model.diffusion_model.")
    assert convert(tmp_path, state, {"num_heads": 2, "image_size": 16}, ema=False).num_heads == 2
    network = load(tmp_path).denoiser.network.unet
    torch.testing.assert_close(network(z, TIMES).sample, run_unet(raw, SAME_NUMBER, z, TIMES), rtol=1e-5, atol=1e-5)


def test_equal_widths_need_no_card(tmp_path):
    unet = UNet((64, 64), 1, (True, True), num_heads=2)
    card = convert(tmp_path, random_weights(unet_shapes(unet), 4), {"num_heads": 2, "image_size": 8, **LINEAR})
    config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert card.num_heads is None and config["attention_head_dim"] == 32


@pytest.mark.parametrize("number", [7, 0, 2.0, "2", True])
def test_a_card_with_impossible_heads(tmp_path, number):
    state = random_weights(unet_shapes(SAME_NUMBER), 4)
    convert(tmp_path, state, {"num_heads": 2, "image_size": 8, **LINEAR})
    path = tmp_path / "out" / "card.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_heads": number}))
    with pytest.raises(PriorError, match=f"num_heads={number} does not divide the (32|64) channels of attention"):
        load(tmp_path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_options_every_missing_fact_is_asked_for(tmp_path, name):
    text = refusal(tmp_path, checkpoints()[name])
    pixel, facts = name.startswith("adm"), ["num_heads=N or num_head_channels=N", "image_size=N"]
    facts += ["beta_schedule=linear|scaled_linear|cosine"] if pixel else []
    facts += ["null_class=INDEX|none"] if name == "ldm_imagenet256" else []
    assert all(fact in text for fact in facts) and name in text and len(text) < 600


@pytest.mark.parametrize(
    ("name", "option", "asked"),
    [
        ("adm_ffhq256", "num_head_channels", "its heads, and"),
        ("ldm_ffhq256", "image_size", "its image size, and"),
        ("adm_imagenet256", "beta_schedule", "its betas, and"),
        ("ldm_imagenet256", "null_class", "its null class, and"),
    ],
)
def test_one_missing_option_is_asked_for_alone(tmp_path, name, option, asked):
    dropped = {option, "beta_start", "beta_end"} if option == "beta_schedule" else {option}
    said = {key: value for key, value in ARCHITECTURES[name].items() if key not in dropped}
    assert f"do not tell {asked}" in refusal(tmp_path, checkpoints()[name], said)


def test_a_file_is_known_by_the_checksum_of_its_card(tmp_path, monkeypatch):
    state = checkpoints()["adm_ffhq256"]
    torch.save(state, tmp_path / "model.pt")
    digest = particledaps.priors.conversion.convert.sha256(tmp_path / "model.pt")
    cards = {"x": dataclasses.replace(read_cards()["ffhq256"], sha256=digest)}
    monkeypatch.setattr(particledaps.priors.conversion.convert, "read_cards", lambda: cards)
    card = convert_checkpoint(tmp_path / "model.pt", tmp_path / "out")
    assert card.schedule == published_schedule(FAMILIES["adm_ffhq256"]) and card.image_size == 256
    assert card.origins == dict.fromkeys(("heads", "image size", "betas"), "its SHA-256") | {
        "prediction type": "the default"
    }
    monkeypatch.setattr(
        particledaps.priors.conversion.convert,
        "read_cards",
        lambda: {"x": dataclasses.replace(cards["x"], sha256="0" * 64)},
    )
    with pytest.raises(PriorError, match="do not tell its heads, image size and betas"):
        convert_checkpoint(tmp_path / "model.pt", tmp_path / "other")


@pytest.mark.parametrize("steps", [1000, 400])
def test_cosine_betas(tmp_path, steps):
    said = SMALL | {"beta_schedule": "cosine"} | ({"num_train_timesteps": steps} if steps != 1000 else {})
    card = convert(tmp_path, random_weights(unet_shapes(ADM_FFHQ), 1), said)
    config = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["beta_schedule"], config["num_train_timesteps"]) == ("squaredcos_cap_v2", steps)
    theirs = DDPMScheduler(num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    sigmas = load(tmp_path).denoiser.noise.sigmas
    torch.testing.assert_close(sigmas[:-2], (1 / theirs - 1).sqrt()[:-2], rtol=1e-3, atol=0)
    linear = (1 / DDPMScheduler(num_train_timesteps=steps).alphas_cumprod.double() - 1).sqrt()
    assert (sigmas / linear).log().abs().max() > 0.5 and card.origins["betas"] == "an option"


def test_betas_of_the_file(tmp_path):
    """They are told by nothing else; an option beside them must agree."""
    state, said = checkpoints()["ldm_imagenet256"], ARCHITECTURES["ldm_imagenet256"]
    ends = {"beta_start": 0.0015, "beta_end": 0.0155}
    text = refusal(tmp_path, state, said | {"beta_schedule": "scaled_linear"} | ends)
    assert (
        "the file holds betas of its own, which are not those of beta_schedule=scaled_linear 0.0015 to 0.0155" in text
    )
    assert "betas of its own" in refusal(tmp_path, state, said | {"beta_schedule": "cosine"})
    agreeing = said | {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    assert convert(tmp_path, state, agreeing).origins["betas"] == "the file"


def test_cosine_betas_of_the_file(tmp_path):
    state = checkpoints()["ldm_imagenet256"]
    state["betas"] = DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=300).betas
    card = convert(tmp_path, state, ARCHITECTURES["ldm_imagenet256"])
    assert card.schedule == {"num_train_timesteps": 300, "beta_schedule": "squaredcos_cap_v2"}
    state["betas"] = torch.zeros(1)
    (tmp_path / "broken").mkdir()
    assert "are no noise schedule" in refusal(tmp_path / "broken", state, ARCHITECTURES["ldm_imagenet256"])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_type_is_an_option(tmp_path, prediction):
    said = ARCHITECTURES["adm_ffhq256"] | {"prediction_type": prediction}
    card = convert(tmp_path, checkpoints()["adm_ffhq256"], said)
    prior = load(tmp_path)
    names = {"epsilon": "EpsilonDenoiser", "v_prediction": "VDenoiser", "sample": "X0Denoiser"}
    assert type(prior.denoiser).__name__ == names[prediction] and card.prediction_type == prediction


@pytest.mark.parametrize(("said", "null"), [("none", None), (None, None), (3, 3), (0, 0)])
def test_the_null_class_is_an_option(tmp_path, said, null):
    card = convert(
        tmp_path, latent_checkpoint(LDM_IMAGENET, VQ), ARCHITECTURES["ldm_imagenet256"] | {"null_class": said}
    )
    assert card.null_class == null and card.origins["null class"] == "an option"
    assert load(tmp_path, class_id=5).condition == "class 5"
    if null is not None:
        assert load(tmp_path).condition == f"class {null}"
        return
    with pytest.raises(PriorError, match="model.class_id is not set: out knows no null class; choose 0 to 10"):
        load(tmp_path)
    with pytest.raises(PriorError, match="model.guidance_scale=2: out knows no null class to guide away from"):
        load(tmp_path, class_id=5, guidance_scale=2.0)


def test_the_null_class_of_the_published_model_needs_its_rows(tmp_path):
    said = {key: value for key, value in ARCHITECTURES["ldm_imagenet256"].items() if key != "null_class"}
    options = {"architecture": said, "family": "ldm_imagenet256"}
    assert "do not tell its null class" in refusal(tmp_path, latent_checkpoint(LDM_IMAGENET, VQ), **options)
    assert convert(tmp_path, latent_checkpoint(LDM_IMAGENET, VQ, classes=1001), **options).null_class == 1000


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ({"beta_start": 0.1}, "beta_start=0.1 needs beta_schedule=linear|scaled_linear|cosine"),
        ({"num_train_timesteps": 400}, "num_train_timesteps=400 needs beta_schedule="),
        ({"beta_schedule": "linear"}, "beta_schedule=linear needs beta_start=NUMBER and beta_end=NUMBER"),
        ({"beta_schedule": "cosine", "beta_end": 0.02}, "beta_schedule=cosine takes no beta_start and beta_end"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid is none of linear, scaled_linear, cosine"),
        ({"beta_schedule": "linear", "beta_start": 0.02, "beta_end": 1e-4}, "beta_start=0.02 is greater than beta_end"),
        ({"beta_schedule": "linear", "beta_start": 0.02, "beta_end": 2}, "beta_end=2 is no number between 0 and 1"),
        ({"beta_schedule": "cosine", "num_train_timesteps": 1}, "num_train_timesteps=1 makes no noise schedule"),
        ({"beta_schedule": "cosine", "num_train_timesteps": 1e3}, "num_train_timesteps=1000.0 is no positive integer"),
        ({"prediction_type": "flow"}, "prediction_type=flow is none of epsilon, v_prediction, sample"),
        ({"null_class": 3}, "null_class=3: this network knows no classes"),
        ({"null_class": "last"}, "null_class=last is neither a class (0 or more) nor none"),
        ({"null_class": -1}, "null_class=-1 is neither a class"),
    ],
)
def test_impossible_options(tmp_path, said, cause):
    assert cause in refusal(tmp_path, checkpoints()["adm_ffhq256"], SMALL | said)


def test_a_null_class_beyond_the_table(tmp_path):
    said = ARCHITECTURES["ldm_imagenet256"] | {"null_class": 11}
    assert "null_class=11: this network knows the classes 0 to 10" in refusal(
        tmp_path, checkpoints()["ldm_imagenet256"], said
    )


def test_a_card_of_before_is_still_read(tmp_path):
    card = convert(tmp_path, checkpoints()["adm_ffhq256"], ARCHITECTURES["adm_ffhq256"])
    path = tmp_path / "out" / "card.json"
    new = ("num_heads", "prediction_type", "schedule", "origins")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in new}))
    old = read_card(tmp_path / "out")
    assert old.origins == {} and dataclasses.replace(old, schedule=card.schedule, origins=card.origins) == card
