"""Diffusers' U-Nets as ``network(input, t) -> prediction``: own arithmetic type, condition, learned sigma dropped."""

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn


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
