import json

import metrics_schema
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import AUTOENCODER, DENOISER, LATENTS, QUICK, RESOLUTION, reconstruct

from particledaps.diffusion.score import score
from particledaps.priors.autoencoder import KLAutoencoder
from particledaps.priors.embedded import load_embedded, save_embedded
from particledaps.priors.prior import in_bfloat16
from particledaps.training import autoencoder as stage_one
from particledaps.training import denoiser as stage_two


@pytest.fixture(scope="module")
def prior(tiny_prior):
    return load_embedded(tiny_prior)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_round_trip_keeps_everything_but_the_last_bits(tmp_path):
    torch.manual_seed(1)
    network, unet = stage_one.build(AUTOENCODER, RESOLUTION), stage_two.build(DENOISER, LATENTS)
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([1.0, 2.0, 0.5, 0.3])
    saved = KLAutoencoder(network, 2, mean, std).eval(), stage_two.wrap(unet, DENOISER, LATENTS).eval()
    facts = {"name": "mine", "misfit_excess": {"phase_retrieval": [3.0, 1.5]}}
    save_embedded(tmp_path / "new" / "folder", *saved, facts)
    prior = load_embedded(tmp_path / "new" / "folder")

    for loaded, original in ((prior.autoencoder.network, network), (prior.denoiser.network, unet)):
        expected = original.state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        for name, value in loaded.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, expected[name].half().float())
    assert torch.equal(prior.autoencoder.mean.flatten(), mean) and torch.equal(prior.autoencoder.std.flatten(), std)
    assert prior.name == "mine" and prior.misfit_excess == {"phase_retrieval": (3.0, 1.5)}
    x, z, sigma = normal(2, 3, 16, 16), normal(2, 4, 4, 4), torch.tensor([0.5, 3.0])
    with torch.no_grad():
        assert torch.allclose(prior.encode(x), saved[0].encode(x), atol=2e-2)
        assert torch.allclose(prior.decode(z), saved[0].decode(z), atol=2e-2)
        assert torch.allclose(prior.denoiser(z, sigma), saved[1](z, sigma), atol=2e-2)


def test_files_are_float16(tiny_prior):
    for name in ("autoencoder", "denoiser"):
        weights = load_file(tiny_prior / f"{name}.safetensors")
        assert {w.dtype for w in weights.values()} == {torch.float16}


def test_saving_what_was_loaded_gives_the_same_files(tiny_prior, prior, tmp_path):
    save_embedded(tmp_path, prior.autoencoder, prior.denoiser, {"name": "tiny"})
    for name in ("config.json", "autoencoder.safetensors", "denoiser.safetensors"):
        assert (tmp_path / name).read_bytes() == (tiny_prior / name).read_bytes()


def test_shapes_and_state(prior):
    assert prior.image_shape == (3, 16, 16) and prior.latent_shape == (4, 4, 4)
    assert prior.decode(normal(5, 4, 4, 4)).shape == (5, 3, 16, 16)
    assert prior.encode(normal(5, 3, 16, 16)).shape == (5, 4, 4, 4)
    for sigma in (0.5, torch.tensor(0.5), torch.full((5,), 0.5)):
        assert prior.denoiser(normal(5, 4, 4, 4), sigma).shape == (5, 4, 4, 4)
    modules = (prior.autoencoder, prior.denoiser)
    assert not any(m.training for module in modules for m in module.modules())
    assert not any(p.requires_grad for module in modules for p in module.parameters())


def test_latents_are_standardised_on_the_way_in_and_out(tiny_prior, tmp_path, prior):
    config = json.loads((tiny_prior / "config.json").read_text())
    config |= {"latent_mean": [1.0, 2.0, 3.0, 4.0], "latent_std": [2.0, 2.0, 4.0, 4.0]}
    for name in ("autoencoder.safetensors", "denoiser.safetensors"):
        (tmp_path / name).write_bytes((tiny_prior / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    moved, x = load_embedded(tmp_path), normal(2, 3, 16, 16)
    mean, std = (torch.tensor(config[k]).reshape(1, 4, 1, 1) for k in ("latent_mean", "latent_std"))
    assert torch.allclose(moved.encode(x), (prior.encode(x) - mean) / std, atol=1e-6)
    assert torch.allclose(moved.decode((prior.encode(x) - mean) / std), prior.decode(prior.encode(x)), atol=1e-4)


def test_pullback_is_the_derivative_of_decode(prior):
    z, direction = normal(2, 4, 4, 4), normal(2, 4, 4, 4, seed=1)
    x, pullback = prior.decode_with_pullback(z)
    weights, step = normal(*x.shape, seed=2), 1e-2
    assert torch.allclose(x, prior.decode(z), atol=1e-6) and not x.requires_grad
    difference = (prior.decode(z + step * direction) - prior.decode(z - step * direction)) / (2 * step)
    by_particle = (pullback(weights) * direction).flatten(1).sum(1)
    assert torch.allclose(by_particle, (difference * weights).flatten(1).sum(1), rtol=2e-2, atol=1e-2)


def test_bfloat16_is_close_and_returns_float32(prior):
    low, z, x = in_bfloat16(prior), normal(3, 4, 4, 4), normal(3, 3, 16, 16)
    pairs = [(low.decode(z), prior.decode(z)), (low.encode(x), prior.encode(x))]
    for sigma in (0.1, 1.0, 10.0):
        pairs.append((low.denoiser(z, sigma), prior.denoiser(z, sigma)))
        pairs.append((score(low.denoiser, z, sigma), score(prior.denoiser, z, sigma)))
    for ours, exact in pairs:
        assert ours.dtype == torch.float32
        assert 0 < (ours - exact).std() < 0.03 * exact.std()
    assert low.image_shape == prior.image_shape and low.latent_shape == prior.latent_shape


CUSTOM = '''
import torch
from particledaps.diffusion.analytic import GaussianDenoiser
from particledaps.operators.operator import Operator
from particledaps.priors.autoencoder import IdentityAutoencoder
from particledaps.priors.prior import Prior


def grey_gaussian(device, compat, side, spread=0.5):
    assert compat.timestep_map == "native"
    pixels = side * side
    denoiser = GaussianDenoiser(torch.zeros(1, side, side), spread**2 * torch.eye(pixels))
    return Prior("grey gaussian", IdentityAutoencoder(), denoiser.to(device), (1, side, side), (1, side, side))


class Rows(Operator):
    """The upper rows of an image."""

    name = "rows"

    def __init__(self, count, noise_sigma):
        self.count, self.noise_sigma = count, noise_sigma

    def __call__(self, x):
        return x[..., : self.count, :]

    def measurement_shape(self, image_shape):
        return image_shape[0], self.count, image_shape[2]
'''


def test_a_prior_and_an_operator_of_the_user(tmp_path, monkeypatch):
    (tmp_path / "custom_parts.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    outcome = reconstruct(
        "model=custom",
        "model.target=custom_parts:grey_gaussian",
        "+model.options.side=12",
        "task=custom",
        "task.target=custom_parts:Rows",
        "+task.options={count: 6, noise_sigma: 0.01}",
        *QUICK,
        "sampler.annealing.num_steps=10",
        "sampler.annealing.sigma_min=0.02",
        "sampler.mcmc.num_steps=100",
        "sampler.mcmc.step_size=2e-5",
        "sampler.mcmc.step_size_min_ratio=1.0",
        "sampler.mcmc.momentum=0.6",
        "sampler.mcmc.tau=0.01",
        "data.end_id=1",
        "num_samples=2",
        f"save_dir={tmp_path}/results",
        "name=custom",
    )
    assert outcome.status == 0, outcome.err
    metrics = metrics_schema.load(tmp_path / "results" / "custom" / "metrics.json")
    assert metrics["metadata"]["conventions"]["noise_sigma"] is None
    row = metrics["measurement"]["per_image"][0]
    assert row["noise_floor"] == pytest.approx(72 * 0.01**2)
    with np.load(tmp_path / "results" / "custom" / "floats" / "00000.npz") as arrays:
        estimates, truth = arrays["estimates"], arrays["truth"]
    assert estimates.shape == (2, 1, 12, 12)
    seen, unseen = (np.abs(estimates - truth)[..., part, :].mean() for part in (slice(0, 6), slice(6, 12)))
    assert seen < 0.05 < unseen
