"""LPIPS from files that are opened as data: piq's number, no code, and no file that changed unseen."""

import os
import shutil

import piq
import pytest
import torch
import torchvision
from torch import nn

from particledaps.checksums import sha256_of
from particledaps.evaluation import lpips as module
from particledaps.evaluation import metrics
from particledaps.evaluation.lpips import LpipsError, load_lpips, lpips_files, read_lpips
from particledaps.priors.cards import read_cards

CPU = torch.device("cpu")
CHANNELS = (64, 128, 256, 512, 512)


class Code:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def vgg_features():
    with torch.device("meta"):
        return torchvision.models.vgg16(weights=None, init_weights=False).features


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Random weights in the layout of the real files (the classifier, which nothing reads, is cut short)."""
    folder, draw = tmp_path_factory.mktemp("weights"), torch.Generator().manual_seed(0)
    state = {
        f"features.{name}": torch.randn(w.shape, generator=draw) * (2 / w[0].numel()) ** 0.5
        for name, w in vgg_features().state_dict().items()
    }
    state |= {"classifier.6.weight": torch.zeros(2, 2), "classifier.6.bias": torch.zeros(2)}
    backbone, weights = (folder / path.name for path in lpips_files())
    torch.save(state, backbone, _use_new_zipfile_serialization=False)  # as torchvision's file of 2017
    torch.save([nn.Parameter(torch.rand(1, c, 1, 1, generator=draw)) for c in CHANNELS], weights)
    yield backbone, weights
    shutil.rmtree(folder)


@pytest.fixture
def placed(originals, monkeypatch, tmp_path):
    """Both files in an own torch hub and an own cache folder, known to a card as the real ones are."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("PARTICLEDAPS_CACHE", str(tmp_path / "cache"))
    backbone, weights = lpips_files()
    backbone.parent.mkdir(parents=True)
    backbone.symlink_to(originals[0])
    shutil.copy(originals[1], weights)
    cards = dict(read_cards())
    know(monkeypatch, cards, "lpips-vgg16", sha256_of(originals[0]))
    return backbone, weights


def know(monkeypatch, cards, name, sha256):
    changed = cards | {name: type(cards[name])(**(vars(cards[name]) | {"sha256": sha256}))}
    monkeypatch.setattr(module, "read_cards", lambda: changed)


def reason():
    """Why LPIPS is left out."""
    with pytest.raises(LpipsError) as error:
        read_lpips(CPU)
    assert load_lpips(CPU) is None
    return str(error.value)


def recorded(tmp_path):
    path = tmp_path / "cache" / "checksums.txt"
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize(
    "kept_as", [list, lambda weights: [w.detach() for w in weights]], ids=["parameters", "tensors"]
)
def test_the_number_is_exactly_that_of_piq(placed, monkeypatch, kept_as):
    state, weights = (torch.load(path, weights_only=True) for path in placed)
    torch.save(kept_as(weights), placed[1])

    def pretrained_vgg16(pretrained, progress):
        network = nn.Module()
        network.features = vgg_features()
        own = {name.removeprefix("features."): w for name, w in state.items() if name.startswith("features.")}
        network.features.load_state_dict(own, assign=True)
        return network

    monkeypatch.setattr("piq.perceptual.vgg16", pretrained_vgg16)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, progress: weights)
    x, y = torch.rand(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    ours, theirs = read_lpips(CPU)(x, y), piq.LPIPS(replace_pooling=True, reduction="none")(x, y)
    assert torch.equal(ours, theirs.detach()) and ours.shape == (3,)
    assert ours.min() > 0.01 and len(set(ours.tolist())) == 3 and not ours.requires_grad


def test_no_random_number_is_drawn(placed):
    before = torch.get_rng_state()
    read_lpips(CPU)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_missing_is_told_with_the_command(placed):
    placed[1].unlink()
    assert reason() == "its weights are not on this machine (bash download.sh lpips)"


@pytest.mark.parametrize("which", [0, 1], ids=["backbone", "weights"])
@pytest.mark.parametrize("legacy", [True, False])
def test_code_in_a_file_does_not_run(placed, monkeypatch, tmp_path, which, legacy):
    placed[which].unlink()
    torch.save({"a": Code(tmp_path / "RAN")}, placed[which], _use_new_zipfile_serialization=not legacy)
    know(monkeypatch, read_cards(), "lpips-vgg16", sha256_of(placed[0]))  # not even where the checksum agrees
    text = reason()
    assert f"{placed[which]} refers to " in text and ".system, code that no weights need (it did not run)" in text
    assert "(delete it, then: bash download.sh lpips)" in text
    assert not (tmp_path / "RAN").exists() and recorded(tmp_path) is None


def test_the_checksum_of_the_card_is_compared_at_every_load(placed):
    assert load_lpips(CPU) is not None
    content = bytearray(placed[0].read_bytes())
    placed[0].unlink()
    content[-1] ^= 1
    placed[0].write_bytes(content)
    assert reason() == (
        f"{placed[0]} has another sha256 than its card or its first download (delete it, then: bash download.sh lpips)"
    )


def test_the_checksum_of_the_first_load_is_recorded_and_compared_ever_after(placed, tmp_path):
    line = f"{sha256_of(placed[1])}  {placed[1]}\n"
    for _ in range(2):
        assert load_lpips(CPU) is not None and recorded(tmp_path) == line
    torch.save([torch.rand(1, c, 1, 1) for c in CHANNELS], placed[1])  # sound weights, but others
    assert f"{placed[1]} has another sha256 than its card or its first download" in reason()
    assert recorded(tmp_path) == line


def test_the_checksum_that_the_download_recorded_is_compared(placed, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "checksums.txt").write_text(f"{'0' * 64}  {placed[1]}\n")
    assert f"{placed[1]} has another sha256" in reason()


def test_the_record_of_a_hub_behind_a_link_is_found(placed, monkeypatch, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "torch")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "link"))
    assert load_lpips(CPU) is not None
    torch.save([torch.rand(1, c, 1, 1) for c in CHANNELS], placed[1])
    assert "has another sha256" in reason()


def test_a_folder_that_cannot_be_written_is_no_obstacle(placed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARTICLEDAPS_CACHE", str(tmp_path / "file" / "cache"))
    assert load_lpips(CPU) is not None and recorded(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1, c, 1, 1) for c in CHANNELS[:4]], "does not hold the five layer weights of LPIPS"),
        ([torch.zeros(c) for c in CHANNELS], "does not hold the five layer weights of LPIPS"),
        ({"a": torch.zeros(1)}, "does not hold the five layer weights of LPIPS"),
        (None, "is damaged"),
        (b"<html>", "is a web page, not the file"),
    ],
)
def test_other_or_damaged_layer_weights_are_refused(placed, tmp_path, content, words):
    if content is None:
        placed[1].write_bytes(placed[1].read_bytes()[:-300])
    elif isinstance(content, bytes):
        placed[1].write_bytes(content)
    else:
        torch.save(content, placed[1])
    assert reason() == f"{placed[1]} {words} (delete it, then: bash download.sh lpips)"
    assert recorded(tmp_path) is None


@pytest.mark.parametrize("content", [{}, {"features.0.weight": torch.zeros(3)}, [torch.zeros(1)]])
def test_another_backbone_is_refused(placed, monkeypatch, content):
    placed[0].unlink()
    torch.save(content, placed[0])
    know(monkeypatch, read_cards(), "lpips-vgg16", sha256_of(placed[0]))
    assert f"{placed[0]} does not hold the weights of VGG16" in reason()


def test_the_names_of_old_lead_here():
    assert metrics.load_lpips is load_lpips and metrics.lpips_files is lpips_files
