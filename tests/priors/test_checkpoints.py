"""Checkpoint folders as priors, against the networks called by hand."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from tiny_checkpoints import LDM, PIXEL, STABLE, WRITERS, write_scheduler

from particledaps.diffusion.noise import ContinuousScaledVPNoise, ContinuousVPNoise
from particledaps.priors.checkpoint import load_checkpoint
from particledaps.priors.diffusers_folder import CheckpointFolder, LoadOptions, open_folder
from particledaps.priors.prior import PriorError
from particledaps.priors.scheduler import build_denoiser

ROOT = Path("/")
SHAPES = {
    "ldm_ffhq": ((3, 32, 32), (3, 8, 8)),
    "ldm_imagenet": ((3, 32, 32), (3, 8, 8)),
    "adm": ((3, 32, 32), (3, 32, 32)),
    "stable_diffusion": ((3, 64, 64), (4, 8, 8)),
    "ddpm": ((3, 32, 32), (3, 32, 32)),
}


def load(folder, kind="diffusers", **options):
    return load_checkpoint(open_folder(str(folder), ROOT), kind, LoadOptions(**options))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def copy(checkpoints, tmp_path):
    """Call it with a name: a copy of that checkpoint that may be changed."""
    return lambda name: Path(shutil.copytree(checkpoints[name], tmp_path / name))


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture(scope="module")
def priors(checkpoints):
    return {name: load(folder) for name, folder in checkpoints.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_shapes_and_state(priors, name):
    prior = priors[name]
    assert (prior.image_shape, prior.latent_shape) == SHAPES[name]
    z, x = normal(2, *prior.latent_shape), normal(2, *prior.image_shape)
    assert prior.decode(z).shape == x.shape and prior.encode(x).shape == z.shape
    for sigma in (0.5, torch.tensor(0.5), torch.tensor([0.1, 20.0])):
        assert prior.denoiser(z, sigma).shape == z.shape
    modules = (prior.autoencoder, prior.denoiser)
    assert not any(m.training for module in modules for m in module.modules())
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert prior.is_pixel == (name in ("adm", "ddpm"))


def by_hand(prior, z, t, betas, prediction, run):
    """``E[z0]`` at timestep ``t`` in variance-preserving variables (Ho et al. 2020; Salimans and Ho 2022)."""
    alpha = DDPMScheduler(**betas).alphas_cumprod[t].double()
    sigma, x_t = (1 / alpha - 1).sqrt(), alpha.sqrt() * z
    output = run(x_t.float(), torch.tensor(float(t))).double()
    estimates = {
        "epsilon": lambda: (x_t - (1 - alpha).sqrt() * output) / alpha.sqrt(),
        "v_prediction": lambda: alpha.sqrt() * x_t - (1 - alpha).sqrt() * output,
        "sample": lambda: output,
    }
    return sigma.item(), estimates[prediction]()


@pytest.mark.parametrize("t", [0, 57, 400, 999])
@pytest.mark.parametrize("name", WRITERS)
def test_denoiser_is_the_network_at_the_checkpoints_own_timestep(checkpoints, priors, name, t):
    prior, folder = priors[name], checkpoints[name]
    z = normal(2, *prior.latent_shape).double()
    unet = prior.denoiser.network.unet
    if name == "ldm_imagenet":
        context = load_file(folder / "class_embedding.safetensors")["weight"][1000].expand(2, 1, -1)
    elif name == "stable_diffusion":
        context = load_file(folder / "prompt_embeddings.safetensors")[""].expand(2, -1, -1)
    arguments = (context,) if name in ("ldm_imagenet", "stable_diffusion") else ()
    betas = {"adm": PIXEL, "ddpm": PIXEL, "stable_diffusion": STABLE}.get(name, LDM)
    with torch.no_grad():
        run = lambda x, time: unet(x, time, *arguments).sample[:, : z.shape[1]]  # noqa: E731
        sigma, expected = by_hand(prior, z, t, betas, "epsilon", run)
        ours = prior.denoiser(z.float(), sigma)
    assert (ours - expected).abs().max() < 1e-4 * max(1, sigma)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_prediction_type_is_read(copy, prediction):
    folder = copy("stable_diffusion")
    change(folder / "scheduler" / "scheduler_config.json", prediction_type=prediction)
    prior, z = load(folder), normal(2, 4, 8, 8).double()
    context = load_file(folder / "prompt_embeddings.safetensors")[""].expand(2, -1, -1)
    with torch.no_grad():
        run = lambda x, time: prior.denoiser.network.unet(x, time, context).sample  # noqa: E731
        sigma, expected = by_hand(prior, z, 300, STABLE, prediction, run)
        assert torch.allclose(prior.denoiser(z.float(), sigma).double(), expected, atol=1e-4)


SCHEDULES = {
    "linear": PIXEL,
    "scaled_linear": LDM,
    "stable diffusion": STABLE,
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400},
    "short": {**LDM, "num_train_timesteps": 50},
    "trained": {"trained_betas": [0.001, 0.01, 0.02, 0.05, 0.3]},
}


@pytest.mark.parametrize("betas", SCHEDULES.values(), ids=SCHEDULES)
def test_betas_are_those_of_the_scheduler(tmp_path, betas):
    write_scheduler(tmp_path, betas)
    expected = DDPMScheduler(**betas).alphas_cumprod.double()
    ours = build_denoiser(None, CheckpointFolder("mine", tmp_path), "native").noise.sigmas
    torch.testing.assert_close(ours, (1 / expected - 1).sqrt(), rtol=1e-3, atol=0)  # diffusers computes in float32


def test_the_map_of_daps(checkpoints):
    folders = {name: open_folder(str(path), ROOT) for name, path in checkpoints.items()}
    maps = {name: build_denoiser(None, folder, "vp").noise for name, folder in folders.items()}
    assert {name for name, noise in maps.items() if isinstance(noise, ContinuousVPNoise)} == {
        "ldm_ffhq",
        "ldm_imagenet",
        "adm",
        "ddpm",
    }
    stable = maps["stable_diffusion"]
    assert isinstance(stable, ContinuousScaledVPNoise)
    assert (stable.num_steps, stable.b**2) == (1000, pytest.approx(0.85))


def test_the_half_that_predicts_sigma_is_dropped(copy):
    folder, z = copy("adm"), normal(2, 3, 32, 32)
    before, file = load(folder).denoiser(z, 2.0), folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for entry in ("conv_out.weight", "conv_out.bias"):
        assert len(weights[entry]) == 6
        weights[entry][3:] += 100
    save_file(weights, file)
    assert torch.equal(load(folder).denoiser(z, 2.0), before)
    weights["conv_out.bias"][:3] += 1
    save_file(weights, file)
    assert torch.allclose(load(folder).denoiser(z, 2.0), before - 2, atol=1e-4)


def test_classes(checkpoints):
    z = normal(2, 3, 8, 8)
    null, seven = (load(checkpoints["ldm_imagenet"], class_id=i) for i in (None, 7))
    assert (null.condition, seven.condition) == ("class 1000", "class 7")
    assert torch.equal(load(checkpoints["ldm_imagenet"], class_id=1000).denoiser(z, 1.0), null.denoiser(z, 1.0))
    assert not torch.allclose(seven.denoiser(z, 1.0), null.denoiser(z, 1.0), atol=1e-3)


@pytest.mark.parametrize("name", ["ldm_imagenet", "stable_diffusion"])
def test_guidance_extrapolates_from_the_null_condition(checkpoints, name):
    condition = {"class_id": 7} if name == "ldm_imagenet" else {"prompt": "a cat"}
    plain, free = load(checkpoints[name], **condition), load(checkpoints[name])
    guided, z = load(checkpoints[name], guidance_scale=2.5, **condition), normal(2, *plain.latent_shape)
    with torch.no_grad():
        toward, away = plain.denoiser(z, 1.5), free.denoiser(z, 1.5)
        assert not torch.allclose(toward, away, atol=1e-3)
        assert torch.allclose(guided.denoiser(z, 1.5), 2.5 * toward - 1.5 * away, atol=1e-4)


def test_scales_of_latents(checkpoints, copy):
    x, z = normal(1, 3, 32, 32), normal(1, 3, 8, 8)
    vq = load(checkpoints["ldm_ffhq"])
    network = vq.autoencoder.network
    assert network.config.scaling_factor == 0.18215  # diffusers' default, wrong here
    with torch.no_grad():
        assert torch.equal(vq.encode(x), network.encode(x).latents)
        assert torch.equal(vq.decode(z), network.decode(z, force_not_quantize=True).sample)
        assert torch.allclose(load(checkpoints["ldm_ffhq"], latent_scale=0.5).encode(x), 0.5 * vq.encode(x))
    folder = copy("ldm_ffhq")
    change(folder / "card.json", latent_scale=2.0)
    assert torch.allclose(load(folder).encode(x), 2 * vq.encode(x))


def test_an_autoencoder_of_other_latents_is_refused(copy):
    folder, other = copy("ldm_ffhq"), copy("stable_diffusion")
    shutil.rmtree(folder / "vae")
    shutil.copytree(other / "vae", folder / "vae")
    with pytest.raises(PriorError, match="maps 3 channels to 3, but 4 to 4 are needed"):
        load(folder)


def test_kl_autoencoder_uses_its_mean_and_its_scale(copy):
    folder, x, z = copy("stable_diffusion"), normal(1, 3, 64, 64), normal(1, 4, 8, 8)
    change(folder / "vae" / "config.json", scaling_factor=0.3)
    prior = load(folder)
    network = prior.autoencoder.network
    with torch.no_grad():
        assert torch.allclose(prior.encode(x), 0.3 * network.encode(x).latent_dist.mean)
        assert torch.allclose(prior.decode(z), network.decode(z / 0.3).sample)
    assert torch.equal(prior.encode(x), prior.encode(x))  # no draw


def test_quantisation_is_a_switch_of_decode_alone(checkpoints):
    plain, quantised = (load(checkpoints["ldm_ffhq"], quantize_in_decode=q) for q in (False, True))
    x, z = normal(1, 3, 32, 32), normal(1, 3, 8, 8)
    assert torch.equal(plain.encode(x), quantised.encode(x))
    codes = plain.autoencoder.network.quantize.embedding.weight
    flat = z.permute(0, 2, 3, 1).reshape(-1, 3)
    nearest = codes[(flat[:, None] - codes).square().sum(2).argmin(1)].reshape(1, 8, 8, 3).permute(0, 3, 1, 2)
    assert torch.allclose(quantised.decode(z), plain.decode(nearest), atol=1e-4)
    assert not torch.allclose(quantised.decode(z), plain.decode(z), atol=1e-3)
    pulled = [prior.decode_with_pullback(start)[1](x) for prior, start in ((quantised, z), (plain, nearest))]
    assert torch.allclose(*pulled, rtol=1e-3, atol=1e-3)  # straight through


@pytest.mark.parametrize("name", ["ldm_ffhq", "stable_diffusion"])
def test_pullback_is_the_derivative_of_decode(priors, name):
    prior = priors[name]
    z, direction = normal(2, *prior.latent_shape), normal(2, *prior.latent_shape, seed=1)
    x, pullback = prior.decode_with_pullback(z)
    weights, step = normal(*x.shape, seed=2), 1e-2
    difference = (prior.decode(z + step * direction) - prior.decode(z - step * direction)) / (2 * step)
    by_particle = (pullback(weights) * direction).flatten(1).sum(1)
    assert torch.allclose(by_particle, (difference * weights).flatten(1).sum(1), rtol=2e-2, atol=2e-2)


def test_shown_at_another_size(checkpoints):
    native, small = (load(checkpoints["stable_diffusion"], image_size=s) for s in (None, 32))
    z, x = normal(1, 4, 8, 8), normal(1, 3, 32, 32)
    assert (small.image_shape, small.latent_shape) == ((3, 32, 32), (4, 8, 8))
    halved = native.decode(z).unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2))  # bilinear by two is the mean of four
    assert torch.allclose(small.decode(z), halved, atol=1e-5)
    large = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    assert torch.allclose(small.encode(x), native.encode(large), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["ldm_ffhq", "adm"])
def test_reduced_precision_keeps_weights_in_it_and_returns_float32(checkpoints, priors, name, dtype):
    exact, low = priors[name], load(checkpoints[name], dtype=dtype)
    assert {p.dtype for p in low.denoiser.parameters()} == {dtype}
    z = normal(2, *exact.latent_shape)
    for sigma in (0.1, 10.0):
        ours, theirs = low.denoiser(z, sigma), exact.denoiser(z, sigma)
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).std() < 0.1 * theirs.std()
    if not exact.is_pixel:
        ours, pullback = low.decode_with_pullback(z)
        assert ours.dtype == pullback(ours).dtype == torch.float32
        assert 0 < (ours - exact.decode(z)).std() < 0.1 * ours.std()


def test_weights_in_other_files(copy):
    folder, z = copy("adm"), normal(1, 3, 32, 32)
    expected, file = load(folder).denoiser(z, 1.0), folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    file.unlink()
    torch.save(weights, file.with_suffix(".bin"))
    assert torch.equal(load(folder).denoiser(z, 1.0), expected)
    save_file({name: value.half() for name, value in weights.items()}, file)
    assert torch.allclose(load(folder).denoiser(z, 1.0), expected, atol=2e-2)
    assert load(folder).denoiser.network.unet.dtype == torch.float32


def test_a_model_of_the_hub_comes_from_the_local_cache_only(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PriorError, match="fetch it first: hf download someone/ldm"):
        load("someone/ldm")
    model = tmp_path / "models--someone--ldm"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    shutil.copytree(checkpoints["ldm_ffhq"], model / "snapshots" / "abc")
    assert load("someone/ldm").name == "someone/ldm"
