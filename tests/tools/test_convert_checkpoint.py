import json

import pytest
import torch
from original_layouts import ARCHITECTURES, checkpoints

from tools.convert_checkpoint import main


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
    main([str(checkpoint("ldm_ffhq256")), str(tmp_path / "raw"), "--no-ema"])
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
