"""Weights below entries and behind wrappers convert to the same network, or the message names what was found."""

import json

import pytest
import torch
from original_layouts import (
    ADM_FFHQ,
    ARCHITECTURES,
    LDM_FFHQ,
    LDM_IMAGENET,
    VQ,
    checkpoints,
    latent_checkpoint,
    prefixed,
    random_weights,
    unet_shapes,
)
from safetensors.torch import load_file, save_file

from particledaps.priors.conversion.convert import convert_checkpoint, read_card
from particledaps.priors.conversion.nesting import find_weights
from particledaps.priors.prior import PriorError
from tools.convert_checkpoint import summary

ADM = random_weights(unet_shapes(ADM_FFHQ), 1)
AVERAGE = random_weights(unet_shapes(ADM_FFHQ), 5)
LDM = checkpoints()["ldm_imagenet256"]
FILES = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")


def convert(folder, content, name, out, **options):
    file = folder / f"{out}.pt"
    torch.save(content, file)
    return convert_checkpoint(file, folder / out, architecture=ARCHITECTURES[name], **options)


def tensors(folder):
    """Every tensor of every network of a converted folder."""
    files = [folder / name for name in (*FILES, "class_embedding.safetensors")]
    return {f"{f.relative_to(folder)}:{k}": v for f in files if f.is_file() for k, v in load_file(f).items()}


def same(found, wanted):
    found, wanted = tensors(found), tensors(wanted)
    assert wanted and found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """name -> folder of what the plain file becomes."""
    folder = tmp_path_factory.mktemp("plain")
    for name, state in (("adm_ffhq256", ADM), ("ldm_imagenet256", LDM)):
        convert(folder, state, name, name)
    convert(folder, AVERAGE, "adm_ffhq256", "average")
    return folder


def inside(state, wrapper):
    """A wrapper around the U-Net alone, as ``torch.compile(model.model.diffusion_model)`` leaves it."""
    return {key.replace("model.diffusion_model.", f"model.diffusion_model.{wrapper}"): v for key, v in state.items()}


def around_first_stage(state):
    return {key.replace("first_stage_model.", "first_stage_model._orig_mod."): value for key, value in state.items()}


WRAPPED = {
    "module.": lambda s: prefixed(s, "module."),
    "_orig_mod.": lambda s: prefixed(s, "_orig_mod."),
    "module._orig_mod.": lambda s: prefixed(s, "module._orig_mod."),
    "_orig_mod.module.": lambda s: prefixed(s, "_orig_mod.module."),
    "module.module.": lambda s: prefixed(s, "module.module."),
    "net.": lambda s: prefixed(s, "net."),
    "module.model.": lambda s: prefixed(s, "module.model."),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
@pytest.mark.parametrize(("name", "state"), [("adm_ffhq256", ADM), ("ldm_imagenet256", LDM)])
def test_wrapped_names_are_the_same_network(plain, tmp_path, name, state, wrapper):
    card = convert(tmp_path, WRAPPED[wrapper](state), name, "out")
    same(tmp_path / "out", plain / name)
    assert card.source_keys == len(state) and set(card.removed_names.values()) == {len(state)}
    assert all(f"removed {w} from {len(state)} names" in summary(card, tmp_path) for w in card.removed_names)


PARTS = [lambda s: inside(s, "_orig_mod."), lambda s: inside(s, "module."), around_first_stage]


@pytest.mark.parametrize("change", PARTS, ids=["compiled U-Net", "parallel U-Net", "compiled first stage"])
def test_a_wrapper_around_one_part(plain, tmp_path, change):
    card = convert(tmp_path, change(LDM), "ldm_imagenet256", "out")
    same(tmp_path / "out", plain / "ldm_imagenet256")
    assert 0 < sum(card.removed_names.values()) < len(LDM)


def test_wrappers_within_the_dotless_names_of_an_average(tmp_path):
    state = latent_checkpoint(LDM_FFHQ, VQ, ema=True)
    convert(tmp_path, state, "ldm_ffhq256", "plain")
    wrapped = {}
    for key, value in state.items():
        dotless = key.startswith("model_ema.diffusion_model")
        wrapped[key.replace("diffusion_model", "diffusion_model_orig_mod") if dotless else key] = value
    card = convert(tmp_path, inside(wrapped, "_orig_mod."), "ldm_ffhq256", "out")
    same(tmp_path / "out", tmp_path / "plain")
    assert card.ema and card.removed_names["_orig_mod."] == 2 * len(unet_shapes(LDM_FFHQ))


@pytest.mark.parametrize("entry", ["model", "state_dict", "model_state_dict", "module", "params", "a.b.c"])
@pytest.mark.parametrize(("name", "state"), [("adm_ffhq256", ADM), ("ldm_imagenet256", LDM)])
def test_nested_weights_are_the_same_network(plain, tmp_path, name, state, entry):
    content = state
    for key in reversed(entry.split(".")):
        content = {key: content}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
    more = {"epoch": 3, "step": torch.tensor(5), "optimizer": optimizer, "args": {"lr": 1e-4}}
    card = convert(tmp_path, content | more, name, "out")
    same(tmp_path / "out", plain / name)
    assert (card.entry, card.ema, card.other_entries) == (entry, False, [])
    assert f"read from its entry {entry}\n" in summary(card, tmp_path)


@pytest.mark.parametrize("entry", ["ema", "model_ema", "ema_state_dict", "params_ema", "EMA", "ema.shadow"])
def test_an_average_alone(plain, tmp_path, entry):
    content = AVERAGE
    for key in reversed(entry.split(".")):
        content = {key: prefixed(content, "module.") if content is AVERAGE else content}
    card = convert(tmp_path, content, "adm_ffhq256", "out")
    same(tmp_path / "out", plain / "average")
    assert card.ema and "weights averaged (EMA)" in summary(card, tmp_path)
    with pytest.raises(PriorError, match=rf"it holds only averaged weights \({entry}\): leave out --no-ema"):
        convert(tmp_path, content, "adm_ffhq256", "raw", ema=False)


def test_the_average_beside_the_raw_weights(plain, tmp_path):
    content = {"model": prefixed(ADM, "_orig_mod."), "ema": AVERAGE, "step": 7}
    card = convert(tmp_path, content, "adm_ffhq256", "averaged")
    same(tmp_path / "averaged", plain / "average")
    assert (card.entry, card.other_entries, card.ema) == ("ema", ["model"], True)
    assert "read from its entry ema; left out: model\n" in summary(card, tmp_path)
    raw = convert(tmp_path, content, "adm_ffhq256", "raw", ema=False)
    same(tmp_path / "raw", plain / "adm_ffhq256")
    assert (raw.entry, raw.other_entries, raw.ema) == ("model", ["ema"], False)
    assert read_card(tmp_path / "raw") == raw


def test_an_average_of_a_whole_latent_model(plain, tmp_path):
    raw = {key: value if key == "betas" else 2 * value for key, value in LDM.items()}
    card = convert(tmp_path, {"model": raw, "ema": LDM}, "ldm_imagenet256", "out")
    same(tmp_path / "out", plain / "ldm_imagenet256")
    assert card.ema and card.other_entries == ["model"]


def test_an_average_of_the_unet_alone_is_not_taken_for_a_pixel_network(plain, tmp_path):
    content = {"state_dict": LDM, "ema": random_weights(unet_shapes(LDM_IMAGENET), 5)}
    card = convert(tmp_path, content, "ldm_imagenet256", "out")
    same(tmp_path / "out", plain / "ldm_imagenet256")
    assert card.entry == "state_dict" and not card.ema


def test_an_average_without_names_is_said_to_be_left_out(plain, tmp_path):
    content = {"model": ADM, "ema": {"decay": 0.999, "shadow_params": [*AVERAGE.values()]}}
    card = convert(tmp_path, content, "adm_ffhq256", "out")
    same(tmp_path / "out", plain / "adm_ffhq256")
    assert not card.ema and card.other_entries == ["ema (tensors without names)"]


def test_safetensors_with_wrapped_names(plain, tmp_path):
    save_file(prefixed(ADM, "module."), tmp_path / "a.safetensors")
    convert_checkpoint(tmp_path / "a.safetensors", tmp_path / "out", architecture=ARCHITECTURES["adm_ffhq256"])
    same(tmp_path / "out", plain / "adm_ffhq256")


REFUSED = {
    "two averages": (
        {"ema_0.999": ADM, "ema_0.9999": AVERAGE},
        r"it holds 2 sets of weights \(ema_0.999, ema_0.9999\): save the one that is meant in a file alone",
    ),
    "two networks": ({"base": ADM, "other": AVERAGE}, r"it holds 2 sets of weights \(base, other\)"),
    "one weight twice": (
        ADM | {"module.out.2.bias": ADM["out.2.bias"]},
        "out.2.bias and module.out.2.bias are one weight in two wrappers",
    ),
    "only numbers": ({"model": {"a": 1}, "epoch": 2}, r"2 entries are no tensors \(model, epoch\)"),
    "numbers among them": ({"model": ADM | {"depth": 3}}, r"1 entries are no tensors \(depth\)"),
    "what is beside it": (
        {"model": ADM, "ema": {k: v for k, v in AVERAGE.items() if k != "out.0.bias"}},
        r"1 missing \(out.0.bias\) \(in its entry ema, beside model\)",
    ),
    "a latent U-Net alone": (prefixed(ADM, "model.diffusion_model."), r"first stage \(encoder.down.\*\) is missing"),
}


@pytest.mark.parametrize(("content", "cause"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_clear_is_named(tmp_path, content, cause):
    with pytest.raises(PriorError, match=cause) as error:
        convert(tmp_path, content, "adm_ffhq256", "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_cards_from_before_entries_were_recorded(plain):
    path = plain / "adm_ffhq256" / "card.json"
    card = json.loads(path.read_text())
    old = {key: value for key, value in card.items() if key not in ("entry", "other_entries", "removed_names")}
    assert len(old) == len(card) - 3
    path.write_text(json.dumps(old))
    assert read_card(path.parent).entry == "" and "read from" not in summary(read_card(path.parent), path.parent)


def test_flat_weights_keep_their_names():
    weights = find_weights(ADM, True)
    assert weights.state.keys() == ADM.keys() and not weights.removed and not weights.others and not weights.averaged
