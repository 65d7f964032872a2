"""The network of nonlinear blur: the decoder of "Exploring image deblurring via blur kernel space" (Tran et al. 2021).

Modules carry the names of its published weights (``GOPRO_wVAE.pth``), without the kernel extractor, which only encodes.
"""

from __future__ import annotations

import torch
from torch import nn


class ResidualBlock(nn.Module):
    """``x + conv2(relu(conv1(x)))``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(self.conv1(x).relu())


class DoubleConvolution(nn.Module):
    """Two 5x5 convolutions, each followed by a ReLU."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 5, padding=2),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.double_conv(x)


class AdapterLevel(nn.Module):
    """One level of the U-Net: halve the side, go deeper (or take in the code), double the side again.

    Inner levels return their result beside their activated input; the outermost one its result through tanh.

    Args:
        widths: channels from this level's input down to the innermost.
        outermost: whether this is the top level.
    """

    def __init__(self, widths: list[int], outermost: bool = False) -> None:
        super().__init__()
        outer, inner = widths[:2]
        down = nn.Conv2d(outer, inner, 4, stride=2, padding=1, bias=False)
        self.outermost = outermost
        self.down = nn.Sequential(down) if outermost else nn.Sequential(nn.LeakyReLU(0.2), down)
        self.submodule = AdapterLevel(widths[1:]) if len(widths) > 2 else None
        last = nn.Tanh() if outermost else nn.Identity()
        doubled = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
        self.up = nn.Sequential(nn.ReLU(), DoubleConvolution(2 * inner, outer), doubled, last)

    def forward(self, x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        below = self.down(x)
        below = torch.cat([below, code], 1) if self.submodule is None else self.submodule(below, code)
        raised = self.up(below)
        # the original activates its input in place, so the skip connection carries the activated one
        return raised if self.outermost else torch.cat([raised, self.down[0](x)], 1)


class Adapter(nn.Module):
    """The U-Net that applies a blur code to features."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = AdapterLevel([channels * factor for factor in (1, 1, 2, 4, 8, 8)], outermost=True)

    def forward(self, x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        return self.model(x, code)


class BlurNetwork(nn.Module):
    """``network(x, code)``: an image in [0, 1] blurred as the code says; sides must be multiples of 128.

    Args:
        channels: features (64).
        front_blocks: residual blocks before the code (10).
        back_blocks: residual blocks after it (20).
        width: features at full resolution (64).
    """

    def __init__(self, channels: int = 64, front_blocks: int = 10, back_blocks: int = 20, width: int = 64) -> None:
        super().__init__()
        leaky = nn.LeakyReLU(0.1)
        self.code_channels = 8 * channels
        self.feature_extractor = nn.Sequential(
            *(nn.Conv2d(3, channels, 3, padding=1), leaky),
            *(nn.Conv2d(channels, channels, 3, stride=2, padding=1), leaky),
            *(nn.Conv2d(channels, channels, 3, stride=2, padding=1), leaky),
            *(ResidualBlock(channels) for _ in range(front_blocks)),
        )
        self.adapter = Adapter(channels)
        self.recon_trunk = nn.Sequential(
            *(ResidualBlock(channels) for _ in range(back_blocks)),
            *(nn.Conv2d(channels, 4 * channels, 3, padding=1), nn.PixelShuffle(2), leaky),
            *(nn.Conv2d(channels, 4 * width, 3, padding=1), nn.PixelShuffle(2), leaky),
            *(nn.Conv2d(width, width, 3, padding=1), leaky),
            nn.Conv2d(width, 3, 3, padding=1),
        )

    def forward(self, x: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
        features = self.feature_extractor(x)
        return self.recon_trunk(self.adapter(features, code.expand(len(x), -1, -1, -1))) + x
