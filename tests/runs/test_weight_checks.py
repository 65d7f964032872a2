import hashlib
import json
import os

import pytest
import torch

from particledaps.checks import SettingsError
from particledaps.doctor import weights as weight_checks
from particledaps.doctor.installation import NOTE, OK, PROBLEM
from particledaps.doctor.weights import card_findings, dino_finding, lpips_finding
from particledaps.evaluation import lpips
from particledaps.evaluation.metrics import lpips_files
from particledaps.priors import cards, dino
from particledaps.priors.cards import Card
from particledaps.priors.prior import PriorError
from particledaps.settings.tasks import load_blur_network

SUM = hashlib.sha256(b"weights").hexdigest()


@pytest.fixture
def known(monkeypatch, tmp_path):
    """One known checkpoint in an empty cache; returns its card."""
    card = Card("net", "the net", "MIT", 1, download="net", url="https://x", file="net.pt", sha256=SUM, becomes="net")
    monkeypatch.setenv("PARTICLEDAPS_CACHE", str(tmp_path))
    monkeypatch.setattr(weight_checks, "read_cards", lambda: {"net": card})
    return card


def test_what_is_not_here_is_listed_with_the_command(known):
    (finding,) = card_findings(None)
    assert finding.state == OK and "not on this machine: net (bash download.sh" in finding.text
    assert card_findings(known) == []


@pytest.mark.parametrize("content, state", [(b"weights", OK), (b"other", PROBLEM), (b"<html>", PROBLEM)])
def test_a_file_is_held_against_its_card(known, content, state):
    known.path().write_bytes(content)
    (finding,) = card_findings(None)
    assert finding.state == state
    assert finding.remedy is None if state == OK else "bash download.sh net" in finding.remedy


@pytest.mark.parametrize("source, state", [(SUM, OK), ("0" * 64, PROBLEM), (None, OK)])
def test_a_conversion_names_its_file(known, source, state):
    known.converted().mkdir()
    (known.converted() / "card.json").write_text(json.dumps({"source_sha256": source}))
    assert [f.state for f in card_findings(None)] == [state]


def test_a_damaged_conversion_is_a_problem(known):
    known.converted().mkdir()
    (known.converted() / "card.json").write_text("{")
    assert [f.state for f in card_findings(None)] == [PROBLEM]


def test_lpips_that_is_missing_or_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("PARTICLEDAPS_CACHE", str(tmp_path / "cache"))
    assert lpips_finding().state == NOTE and lpips_finding().remedy == "bash download.sh lpips"
    for path in lpips_files():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"weights")
    assert lpips_finding().state == PROBLEM
    assert "vgg16-397923af.pth has another sha256 than its card" in lpips_finding().text
    assert lpips_finding().remedy == "delete the file, then: bash download.sh lpips"


def test_code_in_a_weight_file_of_lpips_is_a_problem_and_does_not_run(monkeypatch, tmp_path):
    class Code:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path}/RAN'",)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(lpips, "problem_with_file", lambda card: None)  # as if every checksum agreed
    for path in lpips_files():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"a": Code()}, path)
    finding = lpips_finding()
    assert finding.state == PROBLEM and "code that no weights need (it did not run)" in finding.text
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("factor, state", [(1.0, OK), (0.0, PROBLEM)])
def test_lpips_must_tell_two_images_apart(monkeypatch, tmp_path, factor, state):
    monkeypatch.setattr(weight_checks, "lpips_files", lambda: [])
    monkeypatch.setattr(weight_checks, "read_lpips", lambda device: lambda x, y: factor * (x - y).square().mean())
    assert lpips_finding().state == state


def test_dino_that_is_missing_damaged_or_unknown(monkeypatch, tmp_path):
    monkeypatch.setattr(dino, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *names: None)
    assert dino_finding("vit_tiny_patch16_224", None).state == NOTE
    (tmp_path / "vit_tiny_patch16_224.safetensors").write_bytes(b"<html>")
    assert dino_finding("vit_tiny_patch16_224", None).state == PROBLEM
    assert dino_finding("no_such_model", None).state == PROBLEM


def test_dino_weights_of_the_download_are_found(monkeypatch, tmp_path):
    import timm
    from safetensors.torch import save_file

    monkeypatch.setattr(dino, "CHECKPOINTS", tmp_path)
    with torch.random.fork_rng(devices=[]):
        network = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0)
    save_file(network.state_dict(), tmp_path / "vit_tiny_patch16_224.safetensors")
    finding = dino_finding("vit_tiny_patch16_224", None)
    assert finding.state == OK and "192 features" in finding.text


def test_the_card_of_dino_is_the_file_that_is_looked_for():
    card = cards.read_cards()["dino"]
    assert card.path().name == "vit_small_patch16_224.dino.safetensors" and card.place == "checkpoints"


@pytest.mark.parametrize("name", ["dino", "nonlinear-blur"])
def test_other_weights_than_those_of_the_first_download_are_not_loaded(monkeypatch, tmp_path, name):
    monkeypatch.setenv("PARTICLEDAPS_CACHE", str(tmp_path))
    card = cards.read_cards()[name]
    card.path().write_bytes(b"planted")
    (tmp_path / cards.CHECKSUMS).write_text(f"{SUM}  {card.file}\n")
    loads = {"dino": lambda: dino.DinoFeatures("vit_tiny_patch16_224", card.path())}
    loads["nonlinear-blur"] = lambda: load_blur_network(card.path())
    with pytest.raises(
        (PriorError, SettingsError), match=f"another sha256 .*: delete it, then: bash download.sh {name}"
    ):
        loads[name]()
