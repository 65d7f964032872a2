"""The original networks, computed straight from the tensors of a checkpoint with ``torch.nn.functional``.

Written from the definitions (Dhariwal, Nichol 2021; Rombach et al. 2022; Esser et al. 2021), without diffusers: an
independent reference for the conversion.
"""

import math

import torch
from torch.nn import functional as F


def norm(w, name, h, eps=1e-5):
    return F.group_norm(h, 32, w[f"{name}.weight"], w[f"{name}.bias"], eps)


def conv(w, name, h, stride=1):
    kernel = w[f"{name}.weight"]
    return F.conv2d(h, kernel, w[f"{name}.bias"], stride, kernel.shape[-1] // 2)


def linear(w, name, h):
    return F.linear(h, w[f"{name}.weight"], w.get(f"{name}.bias"))


def softmax_attention(q, k, v):
    """``(B, heads, L, d)``."""
    return ((q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def time_embedding(w, t, width):
    """Cosines, then sines, of frequencies 1 to nearly 1 / 10000."""
    frequencies = 10000.0 ** (-torch.arange(width // 2) / (width // 2))
    angles = t[:, None] * frequencies
    h = torch.cat([angles.cos(), angles.sin()], 1)
    return linear(w, "time_embed.2", F.silu(linear(w, "time_embed.0", h)))


def residual(w, name, x, time, scale_shift, resample=None):
    """``resample`` acts on both branches, after the first normalisation."""
    resample = resample or (lambda h: h)
    h = resample(F.silu(norm(w, f"{name}.in_layers.0", x)))
    h, x = conv(w, f"{name}.in_layers.2", h), resample(x)
    shift = linear(w, f"{name}.emb_layers.1", F.silu(time))[..., None, None]
    if scale_shift:
        scale, shift = shift.chunk(2, 1)
        h = norm(w, f"{name}.out_layers.0", h) * (1 + scale) + shift
    else:
        h = norm(w, f"{name}.out_layers.0", h + shift)
    h = conv(w, f"{name}.out_layers.3", F.silu(h))
    return h + (conv(w, f"{name}.skip_connection", x) if f"{name}.skip_connection.weight" in w else x)


def self_attention(w, name, x, heads, legacy=True):
    """Rows of ``qkv``: head, then query, key, value (legacy), or the other way round."""
    b, c, *sides = x.shape
    h = norm(w, f"{name}.norm", x).flatten(2)
    h = torch.einsum("oi,bil->bol", w[f"{name}.qkv.weight"][..., 0], h) + w[f"{name}.qkv.bias"][:, None]
    h = h.reshape(b, heads, 3, c // heads, -1).unbind(2) if legacy else h.reshape(b, 3, heads, c // heads, -1).unbind(1)
    h = softmax_attention(*(part.transpose(-1, -2) for part in h)).transpose(-1, -2).reshape(b, c, -1)
    h = torch.einsum("oi,bil->bol", w[f"{name}.proj_out.weight"][..., 0], h) + w[f"{name}.proj_out.bias"][:, None]
    return x + h.reshape(b, c, *sides)


def transformer(w, name, x, context, heads):
    """Self-attention, cross attention and a gated layer on the pixels as tokens."""
    h = conv(w, f"{name}.proj_in", norm(w, f"{name}.norm", x, 1e-6)).flatten(2).transpose(1, 2)
    block = f"{name}.transformer_blocks.0"

    def normed(number):
        return F.layer_norm(h, h.shape[-1:], w[f"{block}.norm{number}.weight"], w[f"{block}.norm{number}.bias"])

    def attend(number, queries, keys):
        parts = (
            linear(w, f"{block}.attn{number}.to_{k}", s) for k, s in zip("qkv", (queries, keys, keys), strict=True)
        )
        a = softmax_attention(*(p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in parts))
        return linear(w, f"{block}.attn{number}.to_out.0", a.transpose(1, 2).flatten(2))

    h = h + attend(1, normed(1), normed(1))
    h = h + attend(2, normed(2), context)
    values, gate = linear(w, f"{block}.ff.net.0.proj", normed(3)).chunk(2, -1)
    h = h + linear(w, f"{block}.ff.net.2", values * F.gelu(gate))
    return x + conv(w, f"{name}.proj_out", h.transpose(1, 2).reshape(x.shape))


def run_unet(w, unet, x, t, context=None, labels=None, legacy=True):
    """``unet`` is the layout, ``w`` its tensors."""
    time = time_embedding(w, t, unet.channels[0])
    time = time + w["label_emb.weight"][labels] if labels is not None else time

    def up(h):
        return h.repeat_interleave(2, -1).repeat_interleave(2, -2)

    def block(name, h, resampling=None):
        for part in range(4):
            layer = f"{name}.{part}"
            if f"{layer}.in_layers.0.weight" in w:
                moved = resampling if part or resampling is F.avg_pool2d else None
                pool = (lambda h: F.avg_pool2d(h, 2)) if moved is F.avg_pool2d else moved
                h = residual(w, layer, h, time, unet.scale_shift, pool)
            elif f"{layer}.qkv.weight" in w:
                h = self_attention(w, layer, h, unet.heads(h.shape[1]), legacy)
            elif f"{layer}.proj_in.weight" in w:
                h = transformer(w, layer, h, context, unet.heads(h.shape[1]))
            elif f"{layer}.op.weight" in w:
                h = conv(w, f"{layer}.op", h, 2)
            elif f"{layer}.conv.weight" in w:
                h = conv(w, f"{layer}.conv", up(h))
            elif f"{layer}.weight" in w:
                h = conv(w, layer, h)
        return h

    each, levels, saved, h = unet.res_blocks + 1, len(unet.channels), [], x
    for i in range(each * levels):
        h = block(f"input_blocks.{i}", h, F.avg_pool2d if i and i % each == 0 else None)
        saved.append(h)
    h = residual(w, "middle_block.0", h, time, unet.scale_shift)
    middle = (
        (transformer, (context, unet.heads(h.shape[1])))
        if unet.context
        else (self_attention, (unet.heads(h.shape[1]), legacy))
    )
    h = residual(w, "middle_block.2", middle[0](w, "middle_block.1", h, *middle[1]), time, unet.scale_shift)
    for i in range(each * levels):
        h = block(f"output_blocks.{i}", torch.cat([h, saved.pop()], 1), up)
    return conv(w, "out.2", F.silu(norm(w, "out.0", h)))


def plain_residual(w, name, x):
    h = conv(w, f"{name}.conv1", F.silu(norm(w, f"{name}.norm1", x, 1e-6)))
    h = conv(w, f"{name}.conv2", F.silu(norm(w, f"{name}.norm2", h, 1e-6)))
    return h + (conv(w, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in w else x)


def plain_attention(w, name, x):
    h = norm(w, f"{name}.norm", x, 1e-6)
    q, k, v = (conv(w, f"{name}.{part}", h).flatten(2).transpose(1, 2)[:, None] for part in "qkv")
    return x + conv(w, f"{name}.proj_out", softmax_attention(q, k, v)[:, 0].transpose(1, 2).reshape(x.shape))


def _blocks(w, name, h, count):
    for i in range(count):
        h = plain_residual(w, f"{name}.block.{i}", h)
        h = plain_attention(w, f"{name}.attn.{i}", h) if f"{name}.attn.{i}.q.weight" in w else h
    return h


def _middle(w, half, h):
    h = plain_attention(w, f"{half}.mid.attn_1", plain_residual(w, f"{half}.mid.block_1", h))
    return plain_residual(w, f"{half}.mid.block_2", h)


def encode(w, stage, x):
    """Down-sampling pads on the right and below only."""
    h = conv(w, "encoder.conv_in", x)
    for level in range(len(stage.channels)):
        h = _blocks(w, f"encoder.down.{level}", h, stage.layers)
        name = f"encoder.down.{level}.downsample.conv"
        if level < len(stage.channels) - 1:
            h = F.conv2d(F.pad(h, (0, 1, 0, 1)), w[f"{name}.weight"], w[f"{name}.bias"], 2)
    h = F.silu(norm(w, "encoder.norm_out", _middle(w, "encoder", h), 1e-6))
    return conv(w, "quant_conv", conv(w, "encoder.conv_out", h))


def quantise(w, z):
    """Each pixel becomes the nearest code."""
    codes, pixels = w["quantize.embedding.weight"], z.permute(0, 2, 3, 1)
    nearest = (pixels[..., None, :] - codes).square().sum(-1).argmin(-1)
    return codes[nearest].permute(0, 3, 1, 2)


def decode(w, stage, z):
    """From latents, quantised or not."""
    h = _middle(w, "decoder", conv(w, "decoder.conv_in", conv(w, "post_quant_conv", z)))
    for level in reversed(range(len(stage.channels))):
        h = _blocks(w, f"decoder.up.{level}", h, stage.layers + 1)
        if level:
            h = conv(w, f"decoder.up.{level}.upsample.conv", h.repeat_interleave(2, -1).repeat_interleave(2, -2))
    return conv(w, "decoder.conv_out", F.silu(norm(w, "decoder.norm_out", h, 1e-6)))
