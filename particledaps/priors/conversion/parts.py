"""The networks in a checkpoint, and a reason for every key that goes to none of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from particledaps.priors.conversion import first_stage, unet_mapping
from particledaps.priors.conversion.facts import Facts, Layout
from particledaps.priors.conversion.families import CLASSES, EMA, FIRST_STAGE, UNET, Family, dotless, strip
from particledaps.priors.conversion.mapping import Entry, Problems, Shapes, State, convert, expected, shapes_of, sizes
from particledaps.priors.conversion.unet import UNetArchitecture, read_architecture, vote
from particledaps.priors.errors import PriorError

CLASS_KEY = f"{CLASSES}embedding.weight"
AVERAGES = (f"{EMA}decay", f"{EMA}num_updates")
BUFFERS = (
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "lvlb_weights",
    "logvar",
)
TRAINING = (f"{FIRST_STAGE}loss.", f"{FIRST_STAGE}model_ema.")


@dataclass
class Part:
    """A network to write: the diffusers network without storage, the mapping and the original tensors."""

    network: nn.Module
    entries: list[Entry]
    state: State

    def weights(self) -> State:
        """Its tensors under diffusers' names."""
        return convert(self.entries, self.state)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.network.parameters())


@dataclass
class Contents:
    """What a checkpoint holds.

    Attributes:
        unet: the denoiser.
        vae: the first stage, or None for a pixel U-Net.
        architecture: of the U-Net.
        classes: the class embedding, or None.
        latent_scale: factor from the first stage's latents to those of the U-Net.
        ema: the U-Net's weights are the averaged ones.
        used: number of keys that were read.
        dropped: prefix -> keys under it that were left out.
        reasons: prefix -> why.
        dropped_rows: key -> ``[first, end)`` of the output channels that were left out.
    """

    unet: Part
    architecture: UNetArchitecture
    vae: Part | None = None
    classes: torch.Tensor | None = None
    latent_scale: float = 1.0
    ema: bool = False
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    dropped_rows: dict[str, tuple[int, int]] = field(default_factory=dict)

    def drop(self, state: State, prefix: str, reason: str) -> None:
        """Leave out every key under ``prefix``, which may be a whole key."""
        count = sum(name.startswith(prefix) if prefix.endswith(".") else name == prefix for name in state)
        if count:
            self.dropped[prefix], self.reasons[prefix] = count, reason


def read_layout(state: State, family: Family) -> Layout:
    """What the tensors of a checkpoint tell of its networks.

    Raises:
        PriorError: the blocks of the U-Net form no levels, or the first stage has no encoder.
    """
    raw = shapes_of(strip(state, UNET) if family.latent else state)
    unet, attends = read_architecture(raw), any(name.endswith((".qkv.weight", ".to_q.weight")) for name in raw)
    if not family.latent:
        return Layout(unet, attends=attends)
    encoder = first_stage.read_architecture(shapes_of(_first_stage(state)))
    rows = vote(sizes(shapes_of(state), [CLASS_KEY], 0)) if family.classes else None
    return Layout(unet, encoder, rows, state.get("betas"), attends)


def read_pixel(state: State, layout: Layout, facts: Facts) -> Contents:
    """A U-Net of guided diffusion, a flat state dict.

    Raises:
        PriorError: keys are missing, unexpected or misshapen.
    """
    part = _unet(state, layout, facts, facts.image_size)
    problems = Problems()
    problems.check(shapes_of(state), expected(part.entries))
    problems.stop("it does not fit this U-Net")
    return _without_sigma(Contents(part, layout.unet, used=len(state)), "")


def read_latent(state: State, family: Family, layout: Layout, facts: Facts, ema: bool) -> Contents:
    """A checkpoint of latent diffusion: U-Net, first stage, class embedding, averages and schedule.

    Args:
        state: all tensors of the file.
        family: the published family that has this layout.
        layout: what the shapes tell.
        facts: what they do not.
        ema: use the averaged weights; a family published without them falls back to its only ones.

    Raises:
        PriorError: keys are missing, unexpected or misshapen, or the averages are absent.
    """
    ema = ema and _has_averages(state, family)
    raw = strip(state, UNET)
    encoder = layout.first_stage
    scale = _scale(state)
    unet = _unet(raw, layout, facts, facts.image_size // encoder.factor)
    network = first_stage.build_network(encoder, facts.image_size, scale)
    vae = Part(network, first_stage.map_first_stage(encoder, network), _first_stage(state))
    contents = Contents(unet, layout.unet, vae, state.get(CLASS_KEY), scale, ema)
    _account(contents, state)
    _check(contents, state, raw, family)
    if ema:
        unet.state = {e.source: state[dotless(e.source)] for e in unet.entries}
    contents.used = len(state) - sum(contents.dropped.values())
    return _without_sigma(contents, UNET)


def _first_stage(state: State) -> State:
    """The tensors of the first stage without those of its own training."""
    kept = {name: value for name, value in state.items() if not name.startswith(TRAINING)}
    return strip(kept, FIRST_STAGE)


def _unet(state: State, layout: Layout, facts: Facts, sample_size: int) -> Part:
    network = unet_mapping.build_network(layout.unet, facts.heads, sample_size)
    return Part(network, unet_mapping.map_unet(layout.unet, facts.heads, network), state)


def _has_averages(state: State, family: Family) -> bool:
    found = any(name.startswith(EMA) and name not in AVERAGES for name in state)
    if not found and family.ema:
        raise PriorError("it holds no averaged weights (model_ema.*); --no-ema (ema=False) takes the raw ones")
    return found


def _scale(state: State) -> float:
    value = state.get("scale_factor", torch.ones(()))
    if value.numel() != 1 or not value.item() > 0:
        raise PriorError(f"its scale_factor {value.flatten()[:4].tolist()} is no positive number")
    return value.item()


def _account(contents: Contents, state: State) -> None:
    """List what is left out on purpose."""
    if contents.ema:
        contents.drop(state, UNET, "raw weights; the averaged ones (model_ema.*) are used")
        for name in AVERAGES:
            contents.drop(state, name, "bookkeeping of the average")
    else:
        contents.drop(state, EMA, "averaged weights; the raw ones were asked for")
    for name in BUFFERS:
        contents.drop(state, name, "follows from betas, or only training needs it")
    for prefix in TRAINING:
        contents.drop(state, prefix, "only training needs it")


def _check(contents: Contents, state: State, raw: State, family: Family) -> None:
    problems, shapes = Problems(), shapes_of(state)
    unet = expected(contents.unet.entries)
    problems.check(shapes_of(raw), unet, lambda name: UNET + name)
    problems.check(shapes_of(contents.vae.state), expected(contents.vae.entries), lambda name: FIRST_STAGE + name)
    if contents.ema:
        averages = {name: shapes[name] for name in shapes if name.startswith(EMA) and name not in AVERAGES}
        problems.check(averages, {dotless(name): shape for name, shape in unet.items()})
    problems.check(*_rest(contents, shapes, family))
    problems.stop("it does not fit latent diffusion")


def _rest(contents: Contents, shapes: Shapes, family: Family) -> tuple[Shapes, Shapes]:
    """Shapes, found and expected, of what is in no network."""
    known = (UNET, EMA, FIRST_STAGE)
    rest = {n: s for n, s in shapes.items() if not n.startswith(known) and n not in contents.dropped}
    wanted = {name: rest[name] for name in ("betas", "scale_factor") if name in rest}
    if family.classes:
        rows = sizes(rest, [CLASS_KEY], 0) or [0]
        wanted[CLASS_KEY] = (rows[0], contents.architecture.context_dim)
    return rest, wanted


def _without_sigma(contents: Contents, prefix: str) -> Contents:
    architecture = contents.architecture
    if architecture.learned_sigma:
        rows = (architecture.in_channels, architecture.out_channels)
        contents.dropped_rows = {f"{prefix}out.2.{leaf}": rows for leaf in ("weight", "bias")}
    return contents
