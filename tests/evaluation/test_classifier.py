"""The classifier that judges conditional priors: it learns, is stored, and its features are of images alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from particledaps.evaluation.classifier import load_classifier, save_classifier, train_classifier
from particledaps.evaluation.features import FeaturesError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Grey images of 12 px: class 0 is bright on the left, class 1 on the right, both noisy."""
    generator = np.random.default_rng(0)

    def draw(count):
        labels = np.arange(count) % 2
        images = generator.integers(0, 60, (count, 12, 12))
        for image, label in zip(images, labels, strict=True):
            image[:, 6 * label : 6 * label + 6] += 120
        return images.astype(np.uint8), labels

    train, test = draw(600), draw(80)
    path = tmp_path_factory.mktemp("data") / "sides.npz"
    np.savez(path, train_images=train[0], train_labels=train[1], test_images=test[0], test_labels=test[1])
    return path


def run(*arguments):
    command = [sys.executable, ROOT / "tools" / "train_classifier.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_it_learns_and_what_is_stored_says_how_well(archive, tmp_path):
    outcome = run(archive, "--name", "sides", "--padding", 2, "--out", tmp_path, "--validation", 100, "--epochs", 3)
    assert outcome.returncode == 0, outcome.stderr
    found = load_classifier(tmp_path)
    assert found.accuracy > 0.95 and "of 80 test images" in outcome.stdout and found.class_names == ("0", "1")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["trained_on"] == 500 and config["padding"] == 2
    left = torch.full((1, 1, 16, 16), -1.0)
    left[..., 2:8] = 0.3
    assert found.predict(torch.cat([left, left.flip(-1)])).tolist() == [0, 1]
    features = found.features(left)
    assert found.features.name == "sides" and features.shape == (1, found.features.dim)


def test_the_same_seed_makes_the_same_classifier_and_leaves_the_global_generator_alone():
    images, labels = torch.randn(64, 1, 8, 8), torch.arange(64) % 2
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    one = train_classifier(images, labels, 2, 1, seed=3)
    assert torch.equal(torch.rand(1), expected)
    two, other = (train_classifier(images, labels, 2, 1, seed=seed) for seed in (3, 4))
    assert torch.equal(one(images), two(images)) and not torch.equal(one(images), other(images))


def test_what_is_no_classifier_is_named(tmp_path):
    with pytest.raises(FeaturesError, match=r"no classifier in .*config.json is missing"):
        load_classifier(tmp_path)
    network = train_classifier(torch.randn(8, 1, 8, 8), torch.arange(8) % 2, 2, 1, 0)
    save_classifier(tmp_path, network, {"name": "x", "class_names": ["a", "b"], "accuracy": 0.5})
    assert load_classifier(tmp_path).accuracy == 0.5
    (tmp_path / "classifier.safetensors").write_bytes(b"cut")
    with pytest.raises(FeaturesError, match="is damaged"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--validation", "600"], "--validation must leave some of the 600 images"), (["--epochs", "0"], "--epochs be 1")],
)
def test_arguments_that_cannot_be(archive, tmp_path, more, message):
    outcome = run(archive, "--name", "x", "--out", tmp_path / "x", *more)
    assert outcome.returncode == 1 and message in outcome.stderr and not (tmp_path / "x").exists()


def test_an_archive_without_labels_is_refused(tmp_path):
    images = np.zeros((200, 8, 8), np.uint8)
    np.savez(tmp_path / "plain.npz", train_images=images, test_images=images)
    outcome = run(tmp_path / "plain.npz", "--name", "x", "--out", tmp_path / "x")
    assert outcome.returncode == 1 and "has no train_labels and test_labels" in outcome.stderr


def test_the_shipped_classifier_is_what_its_card_says():
    folder = ROOT / "assets" / "fashion_classifier"
    found, card = load_classifier(folder), (folder / "README.md").read_text()
    assert found.name == "fashion" and len(found.class_names) == 10 and found.class_names[5] == "Sandal"
    assert f"{100 * found.accuracy:.2f} % of the 10 000 test images" in card
    trousers = torch.full((1, 1, 32, 32), -1.0)
    trousers[..., 4:28, 11:15] = trousers[..., 4:28, 17:21] = trousers[..., 4:9, 11:21] = 0.6
    assert found.class_names[found.predict(trousers).item()] == "Trouser"
