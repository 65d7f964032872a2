"""What is no checkpoint, no known network or not whole ends in one sentence that names the cause."""

import os
import pickle
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from original_layouts import ADM_FFHQ, ARCHITECTURES, averages, checkpoints, random_weights, unet_shapes
from safetensors.torch import save_file

from particledaps.priors.conversion import first_stage, unet_mapping
from particledaps.priors.conversion.convert import convert_checkpoint
from particledaps.priors.conversion.facts import Known, find_facts
from particledaps.priors.conversion.families import FAMILIES, OPTIONS, dotless, read_options, recognise
from particledaps.priors.conversion.mapping import shapes_of
from particledaps.priors.conversion.parts import read_latent, read_layout, read_pixel
from particledaps.priors.prior import PriorError

STATES = checkpoints()


@pytest.fixture(scope="module", autouse=True)
def networks_built_once():
    """Hundreds of conversions of four architectures: their diffusers networks need not be built each time."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (unet_mapping, first_stage):
            patch.setattr(module, "build_network", cache(module.build_network))
        yield


def read(state, name, ema=True):
    """The part of a conversion that looks at keys."""
    found = recognise(shapes_of(state), None)
    family = FAMILIES[found]
    layout = read_layout(state, family)
    facts = find_facts(layout, read_options(ARCHITECTURES[name]), Known(found, False, False, lambda: False))
    return read_latent(state, family, layout, facts, ema) if family.latent else read_pixel(state, layout, facts)


def sentence(*arguments, **options):
    with pytest.raises(PriorError) as error:
        convert_checkpoint(*arguments, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    return text


@pytest.fixture
def refused(tmp_path):
    """The sentence for a file that ``write`` makes; nothing may be left behind."""

    def tried(write, name="model.ckpt", **options):
        path = tmp_path / name
        write(path)
        text = sentence(path, tmp_path / "out", **options)
        assert str(path) in text and [p.name for p in tmp_path.iterdir()] == [name]
        return text

    return tried


def chosen(state, step=37):
    """Every ``step``-th key that a conversion reads, and those that decide the architecture."""
    structural = (
        "out.2",
        "time_embed",
        "input_blocks.0.",
        ".conv.",
        ".op.",
        "conv_in",
        "conv_out",
        "quant",
        "embedding",
    )
    names = [n for n in state if not n.startswith(("alphas", "sqrt", "posterior", "model_ema.decay", "model_ema.num"))]
    return sorted({n for n in names if any(s in n for s in structural)} | set(names[::step]))


@pytest.mark.parametrize("name", STATES)
def test_any_missing_key_is_named(name):
    for key in chosen(STATES[name]):
        if key == "betas":
            continue
        with pytest.raises(PriorError) as error:
            read({k: v for k, v in STATES[name].items() if k != key}, name)
        assert f"missing ({key}" in str(error.value), f"{key}: {error.value}"


@pytest.mark.parametrize("name", STATES)
def test_any_misshapen_key_is_named_with_both_shapes(name):
    for key in chosen(STATES[name], step=53):
        value = STATES[name][key]
        if key == "betas" or key.endswith("embedding.weight"):
            continue
        with pytest.raises(PriorError) as error:
            read(STATES[name] | {key: torch.cat([value, value[:1]])}, name)
        shapes = f"{key} {(len(value) + 1, *value.shape[1:])} instead of {tuple(value.shape)}"
        assert shapes in str(error.value), f"{key}: {error.value}"


@pytest.mark.parametrize("name", STATES)
def test_unexpected_keys_are_named(name):
    prefixes = ["", "out.7.", "output_blocks.99.0."]
    if name.startswith("ldm"):
        prefixes = ["", "model.", "model.diffusion_model.", "first_stage_model.", "first_stage_model.encoder.down.0."]
    prefixes += ["cond_stage_model."] if name == "ldm_ffhq256" else []
    prefixes += ["model_ema."] if name == "ldm_ffhq256" else []
    for prefix in prefixes:
        with pytest.raises(PriorError) as error:
            read(STATES[name] | {f"{prefix}surplus": torch.ones(3)}, name)
        assert "surplus" in str(error.value) and "1 unexpected" in str(error.value), prefix


def test_many_problems_are_counted_and_the_first_named():
    state = {k: v for k, v in STATES["adm_ffhq256"].items() if not k.startswith("middle_block.0.")}
    with pytest.raises(PriorError) as error:
        read(state | {"surplus": torch.ones(1)}, "adm_ffhq256")
    text = str(error.value)
    assert "10 missing (middle_block.0.in_layers.0.weight, " in text and ", ...)" in text
    assert "1 unexpected (surplus)" in text


def test_missing_averages_offer_the_raw_weights(refused):
    state = {k: v for k, v in STATES["ldm_ffhq256"].items() if not k.startswith("model_ema.")}
    text = refused(lambda path: torch.save({"state_dict": state}, path), architecture=ARCHITECTURES["ldm_ffhq256"])
    assert "no averaged weights (model_ema.*)" in text and "--no-ema" in text


def test_one_missing_average_is_named():
    key = dotless("middle_block.1.qkv.weight")
    with pytest.raises(PriorError, match=f"1 missing .{key}."):
        read({k: v for k, v in STATES["ldm_ffhq256"].items() if k != key}, "ldm_ffhq256")


def test_averages_are_used_where_a_family_does_not_need_them():
    raw = {k[22:]: v for k, v in STATES["ldm_imagenet256"].items() if k.startswith("model.diffusion_model.")}
    state = STATES["ldm_imagenet256"] | averages({k: v + 1 for k, v in raw.items()})
    contents = read(state, "ldm_imagenet256")
    assert contents.ema and torch.equal(contents.unet.state["out.2.bias"], raw["out.2.bias"] + 1)
    assert not read(state, "ldm_imagenet256", ema=False).ema


class Malicious:
    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("call", ["system", "eval", "getattr"])
def test_a_malicious_pickle_is_refused_and_not_run(refused, tmp_path, call, legacy):
    mark = tmp_path / "ran"
    trap = {
        "system": Malicious(os.system, f"touch {mark}"),
        "eval": Malicious(eval, f"open({str(mark)!r}, 'w')"),
        "getattr": Malicious(getattr, Path(mark), "touch"),
    }[call]
    content = {"state_dict": STATES["adm_ffhq256"], "callbacks": trap}
    text = refused(lambda path: torch.save(content, path, _use_new_zipfile_serialization=not legacy))
    assert "could run code: refused" in text and not mark.exists()
    assert {"system": "posix.system", "eval": "eval", "getattr": "getattr"}[call] in text


def test_a_bare_pickle_that_runs_code_is_refused(refused, tmp_path):
    mark = tmp_path / "ran"
    text = refused(lambda path: path.write_bytes(pickle.dumps(Malicious(os.system, f"touch {mark}"), 2)))
    assert "posix.system" in text and not mark.exists()


def test_leftovers_of_training_frameworks_are_ignored(tmp_path, monkeypatch):
    lightning = type("ModelCheckpoint", (), {"__module__": "pytorch_lightning.callbacks.model_checkpoint"})
    module = type(os)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = lightning
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(__import__("sys").modules, name, module)
        best = {"best_model_score": np.float64(0.5), "best_model_path": "x.ckpt", "monitor": "val/loss"}
        content = {"state_dict": STATES["adm_ffhq256"], "callbacks": {lightning: best}, "made": lightning()}
        torch.save(content, tmp_path / "model.ckpt")
    card = convert_checkpoint(tmp_path / "model.ckpt", tmp_path / "out", architecture=ARCHITECTURES["adm_ffhq256"])
    assert card.family == "adm_ffhq256"


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_a_truncated_file(refused, share, legacy):
    def write(path):
        torch.save(STATES["adm_ffhq256"], path, _use_new_zipfile_serialization=not legacy)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    text = refused(write)
    assert "truncated" in text and "download it again" in text


@pytest.mark.parametrize("size", [9, 5000, -100])
def test_a_truncated_safetensors_file(refused, size):
    def write(path):
        save_file(STATES["adm_ffhq256"], path)
        path.write_bytes(path.read_bytes()[:size])

    assert "truncated" in refused(write, "model.safetensors")


def archive(path):
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("model.ckpt", b"weights")


FILES = {
    "web page": (lambda p: p.write_text("\n <!DOCTYPE html><html><head><title>Virus scan</title>"), "web page (HTML)"),
    "upper-case page": (lambda p: p.write_text("<HTML><BODY>403"), "web page (HTML)"),
    "a JSON answer": (lambda p: p.write_text('{"error": "not found"}'), "no readable PyTorch checkpoint"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "LFS pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "archive": (archive, "archive of model.ckpt, not a checkpoint: unpack it first"),
    "noise": (lambda p: p.write_bytes(bytes(range(256)) * 9), "no readable PyTorch checkpoint"),
    "a tensor": (lambda p: torch.save(torch.ones(3), p), "holds Tensor instead of named weights"),
    "numbers": (lambda p: torch.save({"a": 1}, p), "1 entries are no tensors (a)"),
    "nothing": (lambda p: torch.save({}, p), "instead of named weights"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_checkpoint(refused, kind):
    write, cause = FILES[kind]
    assert cause in refused(write)


def test_a_page_saved_as_safetensors(refused):
    assert "web page (HTML)" in refused(lambda path: path.write_text("<!doctype html>"), "model.safetensors")


def test_a_flattened_tensor_is_named():
    for key in ("input_blocks.0.0.weight", "out.2.weight", "time_embed.0.weight", "middle_block.1.qkv.weight"):
        value = STATES["adm_ffhq256"][key]
        with pytest.raises(PriorError) as error:
            read(STATES["adm_ffhq256"] | {key: value.flatten()}, "adm_ffhq256")
        assert f"{key} ({value.numel()},) instead of {tuple(value.shape)}" in str(error.value)


def test_absent_files_and_folders(tmp_path):
    assert "no such file" in sentence(tmp_path / "nothing.ckpt", tmp_path / "out")
    assert "is a folder" in sentence(tmp_path, tmp_path / "out")


OTHERS = {
    "a classifier of images": ({"conv1.weight": (8, 3, 7, 7), "fc.bias": (10,)}, "(conv1.weight, fc.bias, ...)"),
    "Stable Diffusion": (
        {"model.diffusion_model.out.2.bias": (4,), "cond_stage_model.transformer.text_model.x": (2,)},
        "Stable Diffusion checkpoint, which is read as a diffusers folder",
    ),
    "diffusers": ({"conv_in.weight": (8, 3, 3, 3), "down_blocks.0.x": (2,)}, "without conversion"),
    "a guided-diffusion classifier": (
        {k: v for k, v in unet_shapes(ADM_FFHQ).items() if not k.startswith("output_blocks")},
        "classifiers have none and cannot be used",
    ),
    "a U-Net without its first stage": (
        {k: tuple(v.shape) for k, v in STATES["ldm_imagenet256"].items() if not k.startswith("first_stage_model.")},
        "first stage (encoder.down.*) is missing",
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_networks(refused, kind):
    shapes, cause = OTHERS[kind]
    assert cause in refused(lambda path: torch.save(random_weights(shapes), path))


def test_another_family_than_asked_for(refused):
    def write(path):
        torch.save(STATES["adm_ffhq256"], path)

    assert "family=ldm_ffhq256 was asked for, but the keys are those of adm_ffhq256" in refused(
        write, family="ldm_ffhq256"
    )
    assert "family=sd is none of ldm_ffhq256" in refused(write, family="sd")


def test_broken_numbers_are_refused_and_leave_nothing(refused):
    state = dict(STATES["adm_ffhq256"])
    state["out.0.weight"] = state["out.0.weight"] / 0
    text = refused(lambda path: torch.save(state, path), architecture=ARCHITECTURES["adm_ffhq256"])
    assert "1 tensors are not finite (conv_norm_out.weight)" in text


@pytest.mark.parametrize(
    ("architecture", "cause"),
    [
        ({"depth": 2}, f"architecture knows {', '.join(OPTIONS)}, not depth"),
        ({"num_heads": 0}, "num_heads=0 is no positive integer"),
        ({"num_heads": True}, "num_heads=True is no positive integer"),
        ({"num_heads": 2, "num_head_channels": 32}, "exclude each other"),
        ({"attention_order": "old"}, "attention_order=old is neither legacy nor new"),
        ({"num_head_channels": 48}, "num_head_channels=48 does not divide the U-Net's 64 channels"),
        ({"num_heads": 7}, "num_heads=7 does not divide the U-Net's 64 channels"),
    ],
)
def test_impossible_architectures(refused, architecture, cause):
    assert cause in refused(lambda path: torch.save(STATES["adm_ffhq256"], path), architecture=architecture)


def test_an_existing_folder(tmp_path):
    source, target = tmp_path / "model.pt", tmp_path / "out"
    torch.save(STATES["adm_ffhq256"], source)
    options = {"architecture": ARCHITECTURES["adm_ffhq256"]}
    card = convert_checkpoint(source, target, **options)
    before = {p: p.stat().st_mtime_ns for p in target.rglob("*")}
    assert convert_checkpoint(source, target, **options) == card
    assert before == {p: p.stat().st_mtime_ns for p in target.rglob("*")}
    assert "another conversion (family=adm_ffhq256" in sentence(source, target, family="adm_imagenet256", **options)
    (target / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "is incomplete (unet/diffusion_pytorch_model.safetensors" in sentence(source, target, **options)
    (target / "card.json").write_text("{}")
    assert "is no card" in sentence(source, target, **options)
    (target / "card.json").unlink()
    assert "exists and is no converted checkpoint" in sentence(source, target, **options)


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    torch.save(STATES["ldm_imagenet256"], tmp_path / "model.pt")

    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("particledaps.priors.conversion.convert.DDIMScheduler", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", architecture=ARCHITECTURES["ldm_imagenet256"])
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]
