"""Diffusers' U-Nets as ``network(input, t) -> prediction``: own arithmetic type, condition, learned sigma dropped."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from particledaps.priors.diffusers_folder import CheckpointFolder
from particledaps.priors.errors import PriorError


def set_heads(unet: UNet2DModel, folder: CheckpointFolder) -> UNet2DModel:
    """Divide every attention into the ``num_heads`` of the folder's card, where it names them.

    A ``UNet2DModel`` has one head width for all levels; a network with the same number of heads at levels of unequal
    width is stored in it and gets its heads here.

    Raises:
        PriorError: the number does not divide an attention's channels.
    """
    number, path = folder.card.get("num_heads"), folder.path / "card.json"
    if number is None:
        return unet
    for layer in (module for module in unet.modules() if isinstance(module, Attention)):
        if type(number) is not int or number < 1 or layer.inner_dim % number:
            raise PriorError(f"{path}: num_heads={number} does not divide the {layer.inner_dim} channels of attention")
        layer.heads = layer.sliceable_head_dim = number
        layer.scale = (layer.inner_dim // number) ** -0.5
    return unet


class ImageUNet(nn.Module):
    """A ``UNet2DModel``, with a class where it has them.

    A network with twice as many output as input channels also predicts its variance (Nichol and Dhariwal 2021): that
    half is dropped.
    """

    def __init__(self, unet: UNet2DModel, class_id: int | None = None) -> None:
        super().__init__()
        self.unet, self.class_id = unet, class_id

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        labels = None if self.class_id is None else torch.full((len(z),), self.class_id, device=z.device)
        output = self.unet(z.to(self.unet.dtype), t, class_labels=labels).sample
        return output[:, : z.shape[1]].to(z.dtype)


class ConditionalUNet(nn.Module):
    """A ``UNet2DConditionModel`` that attends to a fixed context ``(L, D)``: a class embedding or a prompt."""

    def __init__(self, unet: UNet2DConditionModel, context: torch.Tensor) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("context", context[None].clone())

    def forward(self, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        context = self.context.to(self.unet.dtype).expand(len(z), -1, -1)
        return self.unet(z.to(self.unet.dtype), t, context).sample[:, : z.shape[1]].to(z.dtype)
