"""A small checkpoint of each family, converted, computes what the original layout defines."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel, UNet2DModel, VQModel
from original_layouts import (
    ADM_FFHQ,
    ADM_IMAGENET,
    ARCHITECTURES,
    KL,
    LDM_FFHQ,
    LDM_IMAGENET,
    LINEAR,
    VQ,
    UNet,
    checkpoints,
    first_stage_shapes,
    latent_checkpoint,
    random_weights,
    unet_shapes,
)
from original_networks import decode, encode, quantise, run_unet
from safetensors.torch import load_file, save_file

from particledaps.diffusion.noise import alphas_cumprod, scaled_linear_betas
from particledaps.priors.conversion.convert import convert_checkpoint, read_card
from particledaps.priors.conversion.families import dotless, strip
from particledaps.priors.prior import PriorError

UNETS = {
    "ldm_ffhq256": LDM_FFHQ,
    "ldm_imagenet256": LDM_IMAGENET,
    "adm_ffhq256": ADM_FFHQ,
    "adm_imagenet256": ADM_IMAGENET,
}
TIMES = torch.tensor([3.7, 812.0])


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """name -> (folder, card, tensors of the file)."""
    folder = tmp_path_factory.mktemp("converted")
    results = {}
    for name, state in checkpoints().items():
        nested = {"state_dict": state, "epoch": 3, "global_step": 10} if name.startswith("ldm") else state
        torch.save(nested, folder / f"{name}.ckpt")
        card = convert_checkpoint(folder / f"{name}.ckpt", folder / name, architecture=ARCHITECTURES[name])
        results[name] = folder / name, card, state
    return results


def load(kind, folder):
    network, report = kind.from_pretrained(folder, output_loading_info=True, low_cpu_mem_usage=False)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return network.eval()


def convert(tmp_path, state, **options):
    torch.save(state, tmp_path / "model.pt")
    return convert_checkpoint(tmp_path / "model.pt", tmp_path / "out", **options)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found, wanted):
    assert found.shape == wanted.shape and wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", UNETS)
def test_the_family_is_recognised_and_every_key_accounted_for(converted, name):
    folder, card, state = converted[name]
    assert card == read_card(folder) and card.family == name
    assert card.used_keys + sum(card.dropped.values()) == card.source_keys == len(state)
    assert set(card.reasons) == set(card.dropped)
    assert card.image_range == [-1, 1] and card.latent_scale == 1.0 and len(card.source_sha256) == 64


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_the_unet_computes_the_same(converted, name):
    folder, card, state = converted[name]
    unet = UNETS[name]
    x, context = normal(2, 3, 8, 8), normal(2, 1, 24, seed=1) if unet.context else None
    weights = strip(state, "model.diffusion_model.") if name.startswith("ldm") else state
    if card.ema:
        weights = {key: state[dotless(key)] for key in weights}
    wanted = run_unet(weights, unet, x, TIMES, context)
    if unet.context:
        found = load(UNet2DConditionModel, folder / "unet")(x, TIMES, encoder_hidden_states=context).sample
    else:
        found = load(UNet2DModel, folder / "unet")(x, TIMES).sample
    close(found, wanted[:, :3])
    assert card.learned_sigma == (wanted.shape[1] == 6)


def test_cards_say_what_was_left_out(converted):
    cards = {name: card for name, (_, card, _) in converted.items()}
    assert cards["ldm_ffhq256"].ema and not cards["ldm_imagenet256"].ema
    raw = cards["ldm_ffhq256"].dropped["model.diffusion_model."]
    assert raw == len(unet_shapes(LDM_FFHQ)) and cards["ldm_ffhq256"].dropped["model_ema.decay"] == 1
    assert set(cards["ldm_imagenet256"].dropped) == {
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "posterior_mean_coef1",
    }
    for name in ("adm_ffhq256", "adm_imagenet256"):
        assert cards[name].dropped == {} and cards[name].num_classes is None
        assert cards[name].dropped_rows == {"out.2.weight": [3, 6], "out.2.bias": [3, 6]}
    assert (cards["ldm_imagenet256"].num_classes, cards["ldm_imagenet256"].null_class) == (11, 10)


def test_raw_weights_on_request(converted, tmp_path):
    state = converted["ldm_ffhq256"][2]
    card = convert(tmp_path, state, ema=False, architecture=ARCHITECTURES["ldm_ffhq256"])
    assert not card.ema and card.dropped["model_ema."] == 2 + len(unet_shapes(LDM_FFHQ))
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(weights["conv_in.weight"], state["model.diffusion_model.input_blocks.0.0.weight"])
    averaged = load_file(converted["ldm_ffhq256"][0] / "unet" / "diffusion_pytorch_model.safetensors")
    assert not torch.equal(weights["conv_in.weight"], averaged["conv_in.weight"])


@torch.no_grad()
def test_the_codebook_autoencoder_computes_the_same(converted):
    folder, _, state = converted["ldm_ffhq256"]
    weights, network = strip(state, "first_stage_model."), load(VQModel, folder / "vae")
    x, z = normal(2, 3, 16, 16), normal(2, 3, 8, 8, seed=1)
    close(network.encode(x).latents, encode(weights, VQ, x))
    close(network.decode(z, force_not_quantize=True).sample, decode(weights, VQ, z))
    close(network.decode(z).sample, decode(weights, VQ, quantise(weights, z)))
    assert not torch.allclose(quantise(weights, z), z, atol=0.1)
    assert network.config.scaling_factor == 1.0


@torch.no_grad()
def test_the_gaussian_autoencoder_computes_the_same(tmp_path):
    state = latent_checkpoint(UNet(), KL, ema=True) | {"scale_factor": torch.tensor(0.25)}
    card = convert(tmp_path, state, architecture={"image_size": 32, "num_head_channels": 32})
    weights, network = strip(state, "first_stage_model."), load(AutoencoderKL, tmp_path / "out" / "vae")
    x, z = normal(1, 3, 32, 32), normal(1, 4, 8, 8, seed=1)
    close(network.encode(x).latent_dist.parameters, encode(weights, KL, x))
    close(network.decode(z).sample, decode(weights, KL, z))
    assert card.latent_scale == network.config.scaling_factor == 0.25
    assert card.parameters["vae"] == sum(value.numel() for value in weights.values())


VARIANTS = {
    "convolutions, no learned variance": (UNet(channels=(32, 64), attention=(True, True), head_channels=16), {}),
    "the other order of query, key and value": (
        UNet(channels=(32, 64), attention=(False, True), updown=True, head_channels=16),
        {"attention_order": "new"},
    ),
    "scale and shift with convolutions": (UNet(scale_shift=True, outputs=6, head_channels=16), {}),
    "classes": (UNet(channels=(32, 64), classes=5, updown=True, scale_shift=True, head_channels=16), {}),
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_architectures_of_guided_diffusion(tmp_path, variant):
    unet, order = VARIANTS[variant]
    state = random_weights(unet_shapes(unet), 4)
    card = convert(tmp_path, state, architecture={"num_head_channels": 16, "image_size": 8} | LINEAR | order)
    x, labels = normal(2, 3, 8, 8), torch.tensor([0, 4]) if unet.classes else None
    found = load(UNet2DModel, tmp_path / "out" / "unet")(x, TIMES, class_labels=labels).sample
    close(found, run_unet(state, unet, x, TIMES, labels=labels, legacy=not order)[:, :3])
    assert (card.num_classes, card.null_class) == (unet.classes, None)


@torch.no_grad()
def test_the_number_of_heads_matters(tmp_path, converted):
    state, x = converted["adm_ffhq256"][2], normal(2, 3, 8, 8)
    wanted = run_unet(state, ADM_FFHQ, x, TIMES)[:, :3]
    convert(tmp_path, state, architecture=ARCHITECTURES["adm_ffhq256"] | {"num_head_channels": 64})
    assert (load(UNet2DModel, tmp_path / "out" / "unet")(x, TIMES).sample - wanted).abs().max() > 1e-3


def test_class_embedding_and_sizes(converted):
    folder, card, state = converted["ldm_imagenet256"]
    embedding = load_file(folder / "class_embedding.safetensors")
    assert embedding.keys() == {"weight"}
    assert torch.equal(embedding["weight"], state["cond_stage_model.embedding.weight"])
    assert json.loads((folder / "unet" / "config.json").read_text())["sample_size"] == 8
    assert json.loads((folder / "vae" / "config.json").read_text())["sample_size"] == card.image_size == 16
    assert not (converted["adm_ffhq256"][0] / "vae").exists()


def test_schedules(converted):
    for name, (folder, _, state) in converted.items():
        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        assert scheduler.config.prediction_type == "epsilon"
        if "betas" in state:
            torch.testing.assert_close(scheduler.alphas_cumprod, state["alphas_cumprod"], rtol=1e-4, atol=0)
            wanted = alphas_cumprod(scaled_linear_betas())
            torch.testing.assert_close(scheduler.alphas_cumprod.double(), wanted.double(), rtol=1e-4, atol=0)
        else:
            assert (scheduler.config.beta_start, scheduler.config.beta_end) == (1e-4, 0.02), name
            assert scheduler.config.beta_schedule == "linear"


def test_a_schedule_of_its_own_is_kept_and_an_unknown_one_refused(tmp_path):
    state = latent_checkpoint(LDM_IMAGENET, VQ)
    state["betas"] = torch.linspace(0.001, 0.01, 400)
    convert(tmp_path, state, architecture=ARCHITECTURES["ldm_imagenet256"])
    config = DDIMScheduler.from_pretrained(tmp_path / "out" / "scheduler").config
    assert (config.num_train_timesteps, config.beta_schedule) == (400, "linear")
    assert (config.beta_start, config.beta_end) == pytest.approx((0.001, 0.01))
    state["betas"] = torch.linspace(0.1, 0.3, 400).cos()
    torch.save(state, tmp_path / "cosine.pt")
    with pytest.raises(PriorError, match="betas are linear neither"):
        convert_checkpoint(tmp_path / "cosine.pt", tmp_path / "cosine", architecture=ARCHITECTURES["ldm_imagenet256"])


def test_half_precision_and_safetensors_become_float32(tmp_path):
    state = {key: value.half() for key, value in random_weights(unet_shapes(ADM_FFHQ), 1).items()}
    save_file(state, tmp_path / "model.safetensors")
    convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out", architecture=ARCHITECTURES["adm_ffhq256"])
    weights = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert torch.equal(weights["conv_in.weight"], state["input_blocks.0.0.weight"].float())


def test_dotless_names_are_unique_at_full_size():
    full = UNet((224, 448, 672, 896), 2, (False, True, True, True))
    names = list(unet_shapes(full))
    assert len({dotless(name) for name in names}) == len(names)


def test_full_size_layouts_have_the_published_numbers_of_parameters():
    def count(shapes):
        return sum(torch.Size(shape).numel() for shape in shapes.values())

    first_stage = first_stage_shapes(type(VQ)((128, 256, 512), 2, (False,) * 3, 3, 8192))
    assert count(first_stage) == pytest.approx(55.32e6, rel=1e-4)
    assert count(unet_shapes(UNet((224, 448, 672, 896), 2, (False, True, True, True)))) == pytest.approx(
        274.06e6, rel=1e-4
    )
    imagenet = UNet((192, 384, 576, 960), 2, (False, True, True, True), context=512)
    assert count(unet_shapes(imagenet)) == pytest.approx(400.92e6, rel=1e-4)
    pixel = {"updown": True, "scale_shift": True, "outputs": 6}
    ffhq = UNet((128, 128, 256, 256, 512, 512), 1, (False, False, False, False, True, False), **pixel)
    assert count(unet_shapes(ffhq)) == pytest.approx(93.56e6, rel=1e-4)
    imagenet = UNet((256, 256, 512, 512, 1024, 1024), 2, (False, False, False, True, True, True), **pixel)
    assert count(unet_shapes(imagenet)) == pytest.approx(552.8e6, rel=1e-4)
