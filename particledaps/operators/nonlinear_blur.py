"""Nonlinear blur by a trained network."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import torch

from particledaps.operators.operator import Operator, check_noise

NETWORK_SIDE = 256


class NonlinearBlur(Operator):
    r"""``A(x) = clip(2 N((x + 1) / 2; code) - 1, -1, 1)`` on colour images in [-1, 1] with a blur network N.

    The network knows 256 px: other images are resized to that (antialiased, bicubic) and back. Gradients by automatic
    differentiation, zero where the output is clipped. (DAPS: the network of Tran et al. 2021 trained on GoPro, one
    code for all images, noise 0.05.)

    Args:
        network: ``network(x, code)`` on images in [0, 1] of 256 px; it is frozen.
        code: ``(1, c, 2, 2)`` the blur.
        noise_sigma: standard deviation of the noise (range of images: [-1, 1]).
    """

    name, image_like = "nonlinear_blur", True

    def __init__(self, network: torch.nn.Module, code: torch.Tensor, noise_sigma: float = 0.05) -> None:
        self.network, self.code = network.eval().requires_grad_(False), code
        self.noise_sigma = check_noise(noise_sigma)
        self._placed = cache(self._placed_on)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        network = self._placed(x.dtype, x.device)
        large = resized(x / 2 + 0.5, (NETWORK_SIDE, NETWORK_SIDE))
        blurred = resized(network(large, self.code.to(x)), x.shape[-2:])
        return (2 * blurred - 1).clamp(-1, 1)

    def _placed_on(self, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
        fits = all(p.dtype == dtype and p.device == device for p in self.network.parameters())
        return self.network if fits else deepcopy(self.network).to(device, dtype)

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        if image_shape[0] != 3:
            raise ValueError(f"the network blurs colour images, not {image_shape[0]} channel(s)")
        return tuple(image_shape)

    def pseudo_inverse(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        """``y`` itself."""
        return y


def resized(x: torch.Tensor, size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """``x`` ``(B, C, H, W)`` at ``size``, bicubic with antialiasing; unchanged where it has that size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return torch.nn.functional.interpolate(x, tuple(size), mode="bicubic", antialias=True, align_corners=False)
