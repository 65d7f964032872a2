"""Names and shapes of original checkpoints, small, with random weights: nothing here knows diffusers.

Latent and guided diffusion number a U-Net's blocks in one flat list: the first convolution, then per level
``res_blocks`` blocks and a resampling step (none after the last level); on the way up ``res_blocks + 1`` a level,
the last of which also resamples. The first stage numbers levels by resolution in both halves.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class UNet:
    """A small U-Net; ``heads`` is the number of heads of an attention over ``width`` channels.

    They have ``head_channels`` each, or there are ``num_heads`` of them at every width.
    """

    channels: tuple = (32, 64)
    res_blocks: int = 1
    attention: tuple = (False, True)
    updown: bool = False
    scale_shift: bool = False
    outputs: int = 3
    context: int | None = None
    classes: int | None = None
    head_channels: int = 32
    num_heads: int | None = None

    def heads(self, width):
        return self.num_heads or width // self.head_channels


@dataclass(frozen=True)
class FirstStage:
    channels: tuple = (32, 64)
    layers: int = 1
    attention: tuple = (False, False)
    latent: int = 3
    codes: int | None = 16


LDM_FFHQ = UNet(channels=(32, 64, 64), res_blocks=2, attention=(False, True, True))
LDM_IMAGENET = UNet(channels=(32, 64), attention=(False, True), context=24, head_channels=64)
ADM_FFHQ = UNet((32, 32, 64), 1, (False, False, True), updown=True, scale_shift=True, outputs=6)
ADM_IMAGENET = UNet((64, 128), 2, (True, True), updown=True, scale_shift=True, outputs=6, head_channels=64)
VQ, KL = FirstStage(), FirstStage((32, 32, 64), 1, (False, True, False), latent=4, codes=None)


def layer(name, *shape):
    """A linear layer, convolution or (one number) normalisation."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def residual(name, inputs, width, time, scale_shift):
    shapes = layer(f"{name}.in_layers.0", inputs) | layer(f"{name}.in_layers.2", width, inputs, 3, 3)
    shapes |= layer(f"{name}.emb_layers.1", width * (2 if scale_shift else 1), time)
    shapes |= layer(f"{name}.out_layers.0", width) | layer(f"{name}.out_layers.3", width, width, 3, 3)
    return shapes | (layer(f"{name}.skip_connection", width, inputs, 1, 1) if inputs != width else {})


def attention(name, width, context):
    shapes = layer(f"{name}.norm", width)
    if context is None:
        return shapes | layer(f"{name}.qkv", 3 * width, width, 1) | layer(f"{name}.proj_out", width, width, 1)
    block = f"{name}.transformer_blocks.0"
    for number, inputs in ((1, width), (2, context)):
        shapes |= {f"{block}.attn{number}.to_q.weight": (width, width)}
        shapes |= {f"{block}.attn{number}.to_{k}.weight": (width, inputs) for k in "kv"}
        shapes |= layer(f"{block}.attn{number}.to_out.0", width, width)
    shapes |= layer(f"{block}.ff.net.0.proj", 8 * width, width) | layer(f"{block}.ff.net.2", width, 4 * width)
    for number in (1, 2, 3):
        shapes |= layer(f"{block}.norm{number}", width)
    return shapes | layer(f"{name}.proj_in", width, width, 1, 1) | layer(f"{name}.proj_out", width, width, 1, 1)


def unet_shapes(unet):
    """Every tensor of the U-Net."""
    first, last, time = unet.channels[0], unet.channels[-1], 4 * unet.channels[0]
    shapes = layer("time_embed.0", time, first) | layer("time_embed.2", time, time)
    shapes |= {"label_emb.weight": (unet.classes, time)} if unet.classes else {}
    shapes |= layer("input_blocks.0.0", first, 3, 3, 3)
    width, skips, index = first, [first], 1
    for level, channels in enumerate(unet.channels):
        for _ in range(unet.res_blocks):
            shapes |= residual(f"input_blocks.{index}.0", width, channels, time, unet.scale_shift)
            shapes |= attention(f"input_blocks.{index}.1", channels, unet.context) if unet.attention[level] else {}
            width, index = channels, index + 1
            skips.append(width)
        if level < len(unet.channels) - 1:
            shapes |= resampling(f"input_blocks.{index}.0", "op", width, time, unet)
            skips.append(width)
            index += 1
    for part in (0, 2):
        shapes |= residual(f"middle_block.{part}", last, last, time, unet.scale_shift)
    shapes |= attention("middle_block.1", last, unet.context)
    index = 0
    for level in reversed(range(len(unet.channels))):
        for block in range(unet.res_blocks + 1):
            name, channels = f"output_blocks.{index}", unet.channels[level]
            shapes |= residual(f"{name}.0", width + skips.pop(), channels, time, unet.scale_shift)
            shapes |= attention(f"{name}.1", channels, unet.context) if unet.attention[level] else {}
            width, index = channels, index + 1
            if level and block == unet.res_blocks:
                shapes |= resampling(f"{name}.{1 + unet.attention[level]}", "conv", width, time, unet)
    return shapes | layer("out.0", first) | layer("out.2", unet.outputs, first, 3, 3)


def resampling(name, convolution, width, time, unet):
    if unet.updown:
        return residual(name, width, width, time, unet.scale_shift)
    return layer(f"{name}.{convolution}", width, width, 3, 3)


def first_stage_shapes(stage):
    """Every tensor of the first stage."""
    z, (first, last) = stage.latent, (stage.channels[0], stage.channels[-1])
    moments = z if stage.codes else 2 * z
    shapes = {"quantize.embedding.weight": (stage.codes, z)} if stage.codes else {}
    shapes |= layer("quant_conv", moments, moments, 1, 1) | layer("post_quant_conv", z, z, 1, 1)
    for half, inputs, width, outputs in (("encoder", 3, first, moments), ("decoder", z, last, 3)):
        shapes |= layer(f"{half}.conv_in", width, inputs, 3, 3)
        for block in (1, 2):
            shapes |= plain_residual(f"{half}.mid.block_{block}", last, last)
        shapes |= plain_attention(f"{half}.mid.attn_1", last)
        end = last if half == "encoder" else first
        shapes |= layer(f"{half}.norm_out", end) | layer(f"{half}.conv_out", outputs, end, 3, 3)
        levels = list(enumerate(stage.channels))
        for level, channels in levels if half == "encoder" else reversed(levels):
            name = f"{half}.down.{level}" if half == "encoder" else f"{half}.up.{level}"
            for block in range(stage.layers + (half == "decoder")):
                shapes |= plain_residual(f"{name}.block.{block}", width, channels)
                shapes |= plain_attention(f"{name}.attn.{block}", channels) if stage.attention[level] else {}
                width = channels
            if half == "encoder" and level < len(levels) - 1:
                shapes |= layer(f"{name}.downsample.conv", width, width, 3, 3)
            if half == "decoder" and level > 0:
                shapes |= layer(f"{name}.upsample.conv", width, width, 3, 3)
    return shapes


def plain_residual(name, inputs, width):
    shapes = layer(f"{name}.norm1", inputs) | layer(f"{name}.conv1", width, inputs, 3, 3)
    shapes |= layer(f"{name}.norm2", width) | layer(f"{name}.conv2", width, width, 3, 3)
    return shapes | (layer(f"{name}.nin_shortcut", width, inputs, 1, 1) if inputs != width else {})


def plain_attention(name, width):
    shapes = layer(f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        shapes |= layer(f"{name}.{part}", width, width, 1, 1)
    return shapes


def random_weights(shapes, seed=0):
    """Weights that keep activations near unit size, biases and scales that matter."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            weights[name] = noise if "embedding" in name else noise / (noise.numel() / shape[0]) ** 0.5
        else:
            weights[name] = 1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise
    return weights


def schedule_buffers():
    """The noise schedule as latent diffusion stores it."""
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    cumulative = (1 - betas).cumprod(0)
    return {
        "betas": betas.float(),
        "alphas_cumprod": cumulative.float(),
        "alphas_cumprod_prev": cumulative.roll(1).float(),
        "sqrt_alphas_cumprod": cumulative.sqrt().float(),
        "posterior_mean_coef1": betas.float(),
    }


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


def averages(weights):
    """The averaged U-Net as latent diffusion stores it: names without dots, and two numbers."""
    shadow = {f"model_ema.diffusion_model{name.replace('.', '')}": value for name, value in weights.items()}
    return {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)} | shadow


def latent_checkpoint(unet, stage, ema=False, classes=11):
    """All tensors of a latent diffusion checkpoint; the averaged U-Net has seed 5, the raw one seed 1."""
    state = prefixed(random_weights(unet_shapes(unet), 1), "model.diffusion_model.")
    state |= averages(random_weights(unet_shapes(unet), 5)) if ema else {}
    state |= prefixed(random_weights(first_stage_shapes(stage), 2), "first_stage_model.")
    if unet.context:
        state["cond_stage_model.embedding.weight"] = random_weights({"embedding": (classes, unet.context)}, 3)[
            "embedding"
        ]
    return state | schedule_buffers()


def checkpoints():
    """A small checkpoint of each family: name -> tensors."""
    return {
        "ldm_ffhq256": latent_checkpoint(LDM_FFHQ, VQ, ema=True),
        "ldm_imagenet256": latent_checkpoint(LDM_IMAGENET, VQ),
        "adm_ffhq256": random_weights(unet_shapes(ADM_FFHQ), 1),
        "adm_imagenet256": random_weights(unet_shapes(ADM_IMAGENET), 1),
    }


LINEAR = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
ARCHITECTURES = {
    "ldm_ffhq256": {"num_head_channels": 32, "image_size": 16},
    "ldm_imagenet256": {"num_heads": 1, "image_size": 16, "null_class": 10},
    "adm_ffhq256": {"num_head_channels": 32, "image_size": 16, **LINEAR},
    "adm_imagenet256": {"num_head_channels": 64, "image_size": 8, **LINEAR},
}
"""What the tensors of the small checkpoints do not tell."""
