"""Priors without a trained autoencoder: transforms, patches, networks that know two levels, their files."""

import json

import pytest
import torch
from tiny import DENOISER

from particledaps.priors.embedded import load_embedded, save_embedded
from particledaps.priors.errors import PriorError
from particledaps.priors.prior import in_bfloat16
from particledaps.priors.transforms import TRANSFORMS, HaarTransform, TwoScaleTransform, root_mean_square
from particledaps.training import denoiser as stage_two
from particledaps.training.denoiser import LatentFacts


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_image_comes_back(name, channels):
    transform, x = TRANSFORMS[name](), normal(2, channels, 8, 6)
    z = transform.encode(x)
    assert z.shape[1] == sum(transform.parts(channels))
    torch.testing.assert_close(transform.decode(z), x)
    torch.testing.assert_close(transform.encode(transform.decode(z)), z)


def test_haar_is_orthonormal_and_its_last_part_the_averages():
    x = normal(3, 3, 8, 8)
    z = HaarTransform().encode(x)
    torch.testing.assert_close(z.square().sum((1, 2, 3)), x.square().sum((1, 2, 3)))
    torch.testing.assert_close(z[:, 9:], 2 * torch.nn.functional.avg_pool2d(x, 2))
    basis = torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4)
    matrix = HaarTransform().encode(basis).flatten(1)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(16, dtype=torch.float64))
    flat = HaarTransform().encode(torch.full((1, 3, 4, 4), 0.5))
    assert flat[:, :9].abs().max() == 0 and (flat[:, 9:] == 1).all()


def test_the_coarse_copy_is_the_mean_of_the_fine_part():
    x = normal(2, 3, 8, 8)
    z = TwoScaleTransform().encode(x)
    torch.testing.assert_close(z[:, 12:], z[:, :12].reshape(2, 3, 4, 4, 4).mean(2))
    bilinear = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    torch.testing.assert_close(z[:, 12:], bilinear)
    moved = z.clone()
    moved[:, 12:] += 1
    assert torch.equal(TwoScaleTransform().decode(moved), x)


def test_the_root_mean_square_of_parts_of_unequal_size():
    assert root_mean_square([1.0, 3.0], (9, 3)) == pytest.approx(((9 + 27) / 12) ** 0.5)
    assert root_mean_square(0.5, (3,)) == 0.5


FACTS = {  # what the denoiser of each is built for, at 16 px
    "pixels": (LatentFacts((3, 16, 16), (3,), 0.5), 2),
    "haar": (LatentFacts((12, 8, 8), (9, 3), [0.1, 0.9]), 1),
    "two_scale": (LatentFacts((15, 8, 8), (12, 3), [0.5, 0.45]), 1),
}


def write(folder, name, seed=0):
    latents, patch = FACTS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = stage_two.DenoiserSettings(**{**vars(DENOISER), "patch": patch})
        denoiser = stage_two.wrap(stage_two.build(settings, latents), settings, latents)
    save_embedded(folder, TRANSFORMS[name](), denoiser, {"name": name})
    return folder, denoiser.eval()


@pytest.mark.parametrize("name", FACTS)
def test_round_trip_of_the_files(name, tmp_path):
    folder, denoiser = write(tmp_path / name, name)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "denoiser.safetensors"]
    prior, latents = load_embedded(folder), FACTS[name][0]
    assert (prior.latent_shape, prior.parts, prior.image_shape) == (latents.shape, latents.parts, (3, 16, 16))
    assert prior.is_pixel == (name == "pixels") and prior.redundant == (name == "two_scale")
    assert prior.latent_std == pytest.approx(root_mean_square(latents.sigma_data, latents.parts))
    z, sigma = normal(2, *prior.latent_shape, dtype=torch.float32), torch.tensor([0.5, 3.0])
    with torch.no_grad():
        assert torch.allclose(prior.denoiser(z, sigma), denoiser(z, sigma), atol=2e-2)
        assert torch.allclose(in_bfloat16(prior).denoiser(z, sigma), prior.denoiser(z, sigma), atol=5e-2)
    x = normal(2, 3, 16, 16, dtype=torch.float32)
    assert torch.allclose(prior.decode(prior.encode(x)), x, atol=1e-5)
    assert in_bfloat16(prior).autoencoder is prior.autoencoder
    save_embedded(tmp_path / "again", prior.autoencoder, prior.denoiser, {"name": name})
    for file in ("config.json", "denoiser.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()


@pytest.mark.parametrize("name", ["haar", "two_scale"])
def test_a_network_with_two_levels_sees_both(name, tmp_path):
    prior = load_embedded(write(tmp_path / name, name)[0])
    fine, z = prior.parts[0], normal(1, *prior.latent_shape, dtype=torch.float32)
    with torch.no_grad():
        reference = prior.denoiser(z, torch.tensor([[1.0, 1.0]]))
        assert torch.equal(prior.denoiser(z, 1.0), reference) and torch.equal(
            prior.denoiser(z, torch.ones(1)), reference
        )
        for part, level in enumerate(([2.0, 1.0], [1.0, 2.0])):
            other = prior.denoiser(z, torch.tensor([level]))
            own, rest = (slice(None, fine), slice(fine, None))[:: 1 - 2 * part]
            assert not torch.allclose(other[:, own], reference[:, own], atol=1e-2)
            assert not torch.allclose(other[:, rest], reference[:, rest], atol=1e-6)  # the level of one moves the other
        held = prior.denoiser(z, torch.tensor([[1.0, 0.0]]))
        assert torch.equal(held[:, fine:], z[:, fine:])
        least = prior.denoiser(z, torch.tensor([[1.0, 1e-7]]))
        torch.testing.assert_close(least[:, :fine], held[:, :fine], rtol=0, atol=1e-4)


DAMAGE = {
    "encoding": ({"encoding": "wavelet"}, "encoding=wavelet: allowed are pixels, haar, two_scale"),
    "scales": ({"sigma_data": [0.1, 0.2, 0.3]}, "haar has 2 parts, one each"),
    "patch": ({"patch": 0}, "patch=0: must be a side of pixel blocks"),
    "channels": ({"patch": 5}, "do not fit encoding and patch"),
    "scale": ({"sigma_data": [0.1, -1.0]}, "sigma_data=[0.1, -1.0]: must be finite and greater than 0"),
    "least": ({"sigma_min": -1.0}, "sigma_min=-1.0: must be finite"),
    "entry": ({"sigma_min": None}, "no valid entry sigma_min"),
}


@pytest.mark.parametrize("case", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files(case, tmp_path):
    changes, fragment = case
    folder, _ = write(tmp_path / "haar", "haar")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(PriorError) as error:
        load_embedded(folder)
    assert fragment in str(error.value) and "\n" not in str(error.value)


def test_a_network_of_another_number_of_levels(tmp_path):
    folder, _ = write(tmp_path / "haar", "haar")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"encoding": "pixels", "sigma_data": 0.5}))
    with pytest.raises(PriorError, match=r"does not fit config.json"):
        load_embedded(folder)
