import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from original_layouts import ARCHITECTURES, checkpoints

from particledaps.priors.cards import read_cards
from tools.convert_checkpoint import main, pairs

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def checkpoint(tmp_path):
    def written(name):
        torch.save({"state_dict": checkpoints()[name]}, tmp_path / f"{name}.ckpt")
        return tmp_path / f"{name}.ckpt"

    return written


def architecture(name):
    return ["--architecture", *(f"{key}={value}" for key, value in ARCHITECTURES[name].items())]


def test_the_summary_lists_what_was_used_and_dropped(checkpoint, tmp_path, capsys):
    source = checkpoint("ldm_ffhq256")
    main([str(source), str(tmp_path / "out"), *architecture("ldm_ffhq256")])
    out = capsys.readouterr().out
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert f"{card['used_keys']} of {card['source_keys']} keys used" in out and "weights averaged (EMA)" in out
    for prefix, count in card["dropped"].items():
        assert f"dropped {count} {prefix}: {card['reasons'][prefix]}" in out
    assert f"unet: {card['parameters']['unet']:,} parameters" in out


def test_raw_weights_a_family_and_dropped_rows(checkpoint, tmp_path, capsys):
    main([str(checkpoint("ldm_ffhq256")), str(tmp_path / "raw"), "--no-ema", *architecture("ldm_ffhq256")])
    assert "weights as stored" in capsys.readouterr().out
    source = checkpoint("adm_ffhq256")
    main([str(source), str(tmp_path / "adm"), "--family", "adm_imagenet256", *architecture("adm_ffhq256")])
    out = capsys.readouterr().out
    assert "adm_imagenet256 from" in out and "dropped rows 3-5 of out.2.weight: learned variance" in out


def test_a_refusal_is_one_sentence(tmp_path):
    (tmp_path / "page.ckpt").write_text("<!doctype html><html>")
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "page.ckpt"), str(tmp_path / "out")])
    text = str(stop.value)
    assert text.startswith(f"convert_checkpoint.py: {tmp_path / 'page.ckpt'} is a web page (HTML)") and "\n" not in text


@pytest.mark.parametrize("argument", ["num_heads", "depth=3", "num_heads=many"])
def test_bad_architecture_arguments(checkpoint, tmp_path, argument):
    with pytest.raises(SystemExit) as stop:
        main([str(checkpoint("adm_ffhq256")), str(tmp_path / "out"), "--architecture", argument])
    assert str(stop.value).startswith("convert_checkpoint.py: ") and "num_heads" in str(stop.value)


def test_the_summary_says_where_facts_come_from(checkpoint, tmp_path, capsys):
    said = ["--architecture", "num_head_channels=32", "image_size=16", "beta_schedule=linear"]
    said += ["beta_start=1e-4", "beta_end=0.02", "prediction_type=v_prediction"]
    main([str(checkpoint("adm_ffhq256")), str(tmp_path / "said"), *said])
    out = capsys.readouterr().out
    assert "predicts v_prediction (from an option)" in out
    assert "betas linear 0.0001 to 0.02 in 1000 steps (from an option)" in out
    assert "images of 16 px (from an option); heads of attention (from an option)" in out
    main([str(checkpoint("ldm_ffhq256")), str(tmp_path / "family"), "--family", "ldm_ffhq256"])
    out = capsys.readouterr().out
    assert "predicts epsilon (from the default)" in out
    assert "betas scaled_linear 0.0015 to 0.0195 in 1000 steps (from the file)" in out
    assert "heads of attention (from family ldm_ffhq256, although its architecture is another)" in out


def test_without_options_the_tool_names_them(checkpoint, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([str(checkpoint("adm_imagenet256")), str(tmp_path / "out")])
    text = str(stop.value)
    assert "\n" not in text and not (tmp_path / "out").exists()
    assert all(word in text for word in ("num_heads=N", "image_size=N", "beta_schedule=", "--family"))


def test_values_are_numbers_where_they_can_be():
    said = pairs(["num_heads=8", "beta_start=1e-4", "beta_end=0.02", "null_class=none", "beta_schedule=cosine"])
    kinds = {"num_heads": 8, "beta_start": 1e-4, "beta_end": 0.02, "null_class": "none", "beta_schedule": "cosine"}
    assert said == kinds and type(said["num_heads"]) is int


@pytest.mark.parametrize("card", [card for card in read_cards().values() if card.becomes and not card.sha256])
def test_download_names_the_family(card, tmp_path):
    """download.sh knows what it fetched: a file of its name that lies there is converted with the family."""
    cache, python = tmp_path / "cache", tmp_path / "python"
    cache.mkdir()
    torch.save(checkpoints()[card.family], cache / card.file)
    python.write_text('#!/bin/sh\necho "called: $*"\nexit 1\n')
    python.chmod(0o755)
    settings = {"PARTICLEDAPS_CACHE": str(cache), "PYTHON": str(python)}
    command = ["bash", str(ROOT / "download.sh"), card.download]
    process = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, cwd=tmp_path)
    assert f"{cache / card.file} {cache / card.becomes} --family {card.family}\n" in process.stdout, process.stderr
