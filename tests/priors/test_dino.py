import shutil
import socket

import numpy as np
import pytest
import timm
import torch
from analytic import F64, prior_of
from huggingface_hub import constants
from safetensors.torch import save_file
from torch.nn import functional as F

from particledaps.particles.feature_spaces import ImageSpace
from particledaps.priors.autoencoder import IdentityAutoencoder
from particledaps.priors.dino import DinoFeatures, dino_weights
from particledaps.priors.prior import PriorError

MODEL = "vit_tiny_patch16_224"
HUB_NAME = "models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k"
MEAN, STD = (torch.tensor(v).reshape(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Any connection is an error; the hub's cache is an empty folder."""

    def refuse(*arguments, **options):
        raise AssertionError("network access")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(MODEL, pretrained=False, num_classes=7, depth=2)
        for value in model.parameters():  # timm starts biases at 0 and gains at 1: nothing to mix up
            if value.ndim == 1:
                value.data += 0.3 * torch.randn_like(value)
    return model.eval()


@pytest.fixture(scope="module")
def weights(network, tmp_path_factory, module_patch):
    path = tmp_path_factory.mktemp("dino") / "tiny.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def module_patch():
    """A network of two blocks instead of twelve."""
    original = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda name, **options: original(name, **{"depth": 2, **options}))
        yield patch


@pytest.fixture(scope="module")
def features(weights):
    return DinoFeatures(MODEL, weights)


def images(*shape, seed=0):
    return 0.8 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 0.8


def class_token(network, x):
    """``x`` in [0, 1], 224 px."""
    with torch.no_grad():
        return network.forward_features((x - MEAN) / STD)[:, 0]


def test_features_are_the_class_token_of_the_saved_network(features, network):
    x = images(2, 3, 224, 224)
    torch.testing.assert_close(features(x), class_token(network, x / 2 + 0.5), rtol=1e-4, atol=1e-4)
    assert features(x)[0].sub(features(x)[1]).norm() > 0.1
    assert not any(p.requires_grad for p in features.parameters())
    assert not any(m.training for m in features.modules())


@pytest.mark.parametrize("format", ["state dict", "state dict without head"])
def test_a_torch_file_is_the_same(network, features, tmp_path, format, module_patch):
    state = network.state_dict()
    kept = {k: v for k, v in state.items() if format == "state dict" or not k.startswith("head.")}
    torch.save(kept, tmp_path / "tiny.pth")
    x = images(1, 3, 64, 64)
    assert torch.equal(DinoFeatures(MODEL, tmp_path / "tiny.pth")(x), features(x))


def test_small_images_are_enlarged_bicubically_and_large_ones_reduced_without_aliasing(features, network):
    small, large = images(1, 3, 64, 64), images(1, 3, 300, 300)
    enlarged = F.interpolate(small / 2 + 0.5, (224, 224), mode="bicubic")
    reduced = F.interpolate(large / 2 + 0.5, (224, 224), mode="bilinear", antialias=True)
    for x, seen in ((small, enlarged), (large, reduced)):
        torch.testing.assert_close(features(x), class_token(network, seen), rtol=1e-4, atol=1e-4)


def test_grey_images_repeat_their_channel_and_values_are_clipped(features):
    grey = images(1, 1, 64, 64)
    torch.testing.assert_close(features(grey), features(grey.expand(1, 3, 64, 64)), rtol=1e-5, atol=1e-5)
    wild = 3 * images(1, 3, 64, 64)
    torch.testing.assert_close(features(wild), features(wild.clamp(-1, 1)), rtol=1e-5, atol=1e-5)


def test_gradient_reaches_the_image(weights, module_patch):
    """In float64, against central differences along a random direction."""
    precise = DinoFeatures(MODEL, weights).double()
    x, direction = (images(1, 3, 32, 32, seed=s).to(F64) for s in range(2))
    pull = torch.randn(1, 192, generator=torch.Generator().manual_seed(2), dtype=F64)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad((precise(leaf) * pull).sum(), leaf)
    step = 1e-5
    ahead, behind = ((precise(x + s * direction) * pull).sum() for s in (step, -step))
    expected = ((ahead - behind) / (2 * step)).item()
    assert abs(expected) > 1e-4
    assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-6)
    assert (gradient.flatten(1) != 0).double().mean() > 0.99


def test_particles_are_pushed_apart_in_feature_space(features):
    space = ImageSpace(prior_of(None, (3, 32, 32), IdentityAutoencoder()), features, "dino")
    x = images(2, 3, 32, 32)
    force, before = space.force(x)
    assert (force.flatten(1).norm(dim=1) > 0).all()
    torch.testing.assert_close(before[0, 1], (features(x)[0] - features(x)[1]).norm(), rtol=1e-4, atol=1e-4)
    step = 0.05 / force.abs().max()
    assert space.force(x + step * force).distances[0, 1] > before[0, 1] > space.force(x - step * force).distances[0, 1]


# --- Where weights come from -----------------------------------------------------------------------------------------


def sentence(error):
    text = str(error.value)
    assert "\n" not in text and len(text) > 20
    return text


def test_missing_file(tmp_path):
    with pytest.raises(PriorError) as error:
        dino_weights(MODEL, str(tmp_path / "none.pth"))
    assert sentence(error) == f"repulsion_dino_path={tmp_path}/none.pth: no such file"


def test_a_given_file_is_taken(weights):
    assert dino_weights(MODEL, str(weights)) == weights


def test_unknown_model():
    with pytest.raises(PriorError) as error:
        dino_weights("vit_enormous", None)
    assert sentence(error) == "repulsion_dino_model=vit_enormous: timm knows no such model"


@pytest.mark.parametrize("model", [MODEL, "vit_small_patch16_224.dino"])
def test_an_empty_cache_has_no_weights_and_nothing_is_downloaded(model):
    assert dino_weights(model, None) is None


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_the_cache_are_found(weights, tmp_path, name):
    repository = tmp_path / "hub" / HUB_NAME
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    (repository / "snapshots" / "0123abcd").mkdir(parents=True)
    shutil.copy(weights, repository / "snapshots" / "0123abcd" / name)
    assert dino_weights(MODEL, None) == repository / "snapshots" / "0123abcd" / name


def test_wrong_files(network, tmp_path, module_patch):
    state = network.state_dict()
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "text.safetensors").write_text("not weights")
    torch.save([1, 2, 3], tmp_path / "list.pth")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save({k: v[..., :3] if k == "cls_token" else v for k, v in state.items()}, tmp_path / "cut.pth")
    torch.save({k: v for k, v in state.items() if k != "norm.weight"}, tmp_path / "lacks.pth")
    np.savez(tmp_path / "arrays.npz", **{k: v.numpy() for k, v in state.items()})
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(PriorError) as error:
            DinoFeatures(MODEL, path)
        assert sentence(error).startswith(f"{path} does not hold the weights of {MODEL}: ")
