"""Networks of the priors that ``train_prior.py`` makes: a ``UNet2DModel`` on pixel blocks, with classes or levels."""

from __future__ import annotations

import copy

import torch
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn
from torch.nn import functional as F

WIDTH = 64
"""Sines and cosines that a further noise level is shown as."""


class LevelEmbedding(nn.Module):
    """Noise levels beyond the first as a vector that is added to the network's embedding of the first.

    Args:
        count: how many.
        dim: length of the vector.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH * count, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """``(P, count)`` -> ``(P, dim)``."""
        waves = get_timestep_embedding(t.flatten(), WIDTH, flip_sin_to_cos=True, downscale_freq_shift=0)
        return self.layers(waves.reshape(len(t), -1).to(self.layers[0].weight.dtype))


class UNetNetwork(nn.Module):
    """A ``UNet2DModel`` as ``network(input, c_noise) -> tensor``.

    Args:
        unet: the network; with ``levels`` its ``class_embed_type`` is ``identity``.
        patch: side of the pixel blocks it works on (space to depth).
        levels: embedding of the noise levels beyond the first; None: there is one.
        condition: class of all samples, or of each ``(P,)``; None: the last of the table, the null class.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        patch: int = 1,
        levels: LevelEmbedding | None = None,
        condition: torch.Tensor | int | None = None,
    ) -> None:
        super().__init__()
        self.unet, self.levels = unet, levels
        self.patch = patch
        self.condition = condition
        self.register_load_state_dict_pre_hook(_with_names_of_before)

    @property
    def num_classes(self) -> int:
        """Classes without the null class; 0: the network knows none."""
        return (self.unet.config.num_class_embeds or 1) - 1

    def conditioned(self, condition: torch.Tensor | int | None) -> UNetNetwork:
        """The same weights under another condition."""
        other = copy.copy(self)
        other.condition = condition
        return other

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """``z`` ``(P, C, H, W)`` and ``t`` ``(P,)`` or ``(P, S)`` -> like ``z``."""
        blocks = F.pixel_unshuffle(z, self.patch) if self.patch > 1 else z
        if self.levels is not None:
            output = self.unet(blocks, t[:, 0], self.levels(t[:, 1:])).sample
        elif self.num_classes:
            output = self.unet(blocks, t, self._labels(z)).sample
        else:
            output = self.unet(blocks, t).sample
        return F.pixel_shuffle(output, self.patch) if self.patch > 1 else output

    def _labels(self, z: torch.Tensor) -> torch.Tensor:
        chosen = self.num_classes if self.condition is None else self.condition
        return torch.as_tensor(chosen, device=z.device).expand(len(z))

    def weights(self) -> dict[str, torch.Tensor]:
        """What is stored: the U-Net's own names, and ``levels.*`` beside them."""
        own = {} if self.levels is None else self.levels.state_dict()
        return self.unet.state_dict() | {f"levels.{name}": value for name, value in own.items()}

    def load_weights(self, weights: dict[str, torch.Tensor]) -> None:
        """Load what :meth:`weights` gave.

        Raises:
            RuntimeError: names or shapes do not fit.
        """
        if self.levels is None:
            self.unet.load_state_dict(weights)
            return
        own = {name for name in weights if name.startswith("levels.")}
        self.levels.load_state_dict({name.removeprefix("levels."): weights[name] for name in own})
        self.unet.load_state_dict({name: value for name, value in weights.items() if name not in own})


def around_unet(unet: UNet2DModel, patch: int = 1, num_levels: int = 1) -> UNetNetwork:
    """The network of a U-Net; with several levels their embedding has fresh weights (the caller seeds torch)."""
    if num_levels == 1:
        return UNetNetwork(unet, patch)
    return UNetNetwork(unet, patch, LevelEmbedding(num_levels - 1, 4 * unet.config.block_out_channels[0]))


def _with_names_of_before(module: nn.Module, weights: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    """Checkpoints of trainings that began before the network had a patch hold the U-Net's own names."""
    if not any(name.startswith(f"{prefix}unet.") for name in weights):
        for name in [n for n in weights if n.startswith(prefix)]:
            weights[f"{prefix}unet.{name.removeprefix(prefix)}"] = weights.pop(name)
