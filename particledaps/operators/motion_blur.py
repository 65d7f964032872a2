"""Motion blur."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache

import torch

from particledaps.operators.motion_kernel import draw_motion_kernel
from particledaps.operators.operator import LinearOperator, check_noise, check_reference_side, pixels

FFT_MULTIPLE = 16


class MotionBlur(LinearOperator):
    r"""Correlation of images in [-1, 1] with a random motion kernel, reflected about the edge pixels.

    .. math:: A = V \, C_k P, \qquad A^T = P^T C_k^T V^T

    with the reflection P, circular correlation C by FFT on the reflected image and V, which keeps the part that the
    circle's seam does not touch. The adjoint folds the reflected border back. (DAPS: kernel 61, intensity 0.5, one
    kernel for all images, noise 0.05.)

    Args:
        kernel_size: side of the kernel, odd, in pixels of an image of ``reference_side``.
        intensity: 0 for straight motion to 1 for a winding one.
        reference_side: image side that ``kernel_size`` is given for; None: pixels of the image at hand.
        per_image: draw a kernel for each image; False: one for all (DAPS).
        noise_sigma: standard deviation of the noise (range of images: [-1, 1]).

    Raises:
        ValueError: a value is out of range.
    """

    name = "motion_blur"
    image_like = True
    part_name = "kernel"

    _spectrum: Callable[[tuple[int, int], torch.dtype, torch.device], torch.Tensor]

    def __init__(
        self,
        kernel_size: int = 61,
        intensity: float = 0.5,
        reference_side: int | None = 256,
        per_image: bool = True,
        noise_sigma: float = 0.05,
    ) -> None:
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd and at least 1")
        if not 0 <= intensity <= 1:
            raise ValueError(f"intensity={intensity}: must be from 0 to 1")
        self.kernel_size = kernel_size
        self.intensity = float(intensity)
        self.per_image = per_image
        self.reference_side, self.noise_sigma = check_reference_side(reference_side), check_noise(noise_sigma)

    def for_image(self, image_shape: tuple[int, int, int], generator: torch.Generator) -> MotionBlur:
        self.measurement_shape(image_shape)
        return self.with_part(draw_motion_kernel(self._size(image_shape), self.intensity, generator))

    def with_part(self, part: torch.Tensor) -> MotionBlur:
        square = part.ndim == 2 and part.shape[0] == part.shape[1] and len(part) % 2 == 1
        if not (square and part.isfinite().all() and part.sum() > 0):
            raise ValueError(f"kernel of shape {tuple(part.shape)}: must be (k, k) with odd k, finite, of positive sum")
        bound = copy(self)
        bound.part = part.float()
        bound._spectrum = cache(bound._spectrum_on)
        return bound

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        size = self._size(image_shape) if self.part is None else len(self.part)
        if size // 2 >= min(image_shape[1:]):
            raise ValueError(f"kernel_size={size}: half of it exceeds images of {image_shape[1]}x{image_shape[2]} px")
        return tuple(image_shape)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        spectrum, radius, size = self._prepared(x)
        padded = torch.nn.functional.pad(x, [radius] * 4, mode="reflect")
        blurred = torch.fft.irfft2(torch.fft.rfft2(padded, s=size) * spectrum, s=size)
        return blurred[..., : x.shape[-2], : x.shape[-1]]

    def adjoint(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        spectrum, radius, size = self._prepared(y)
        spread = torch.fft.irfft2(torch.fft.rfft2(y, s=size) * spectrum.conj(), s=size)
        spread = spread[..., : y.shape[-2] + 2 * radius, : y.shape[-1] + 2 * radius]
        return fold_reflection(fold_reflection(spread, radius).mT, radius).mT

    def pseudo_inverse(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        """``y`` itself: undoing the kernel would amplify the noise without bound."""
        return y

    def _size(self, image_shape: tuple[int, int, int]) -> int:
        return 2 * (int(pixels(self.kernel_size, image_shape, self.reference_side)) // 2) + 1

    def _prepared(self, like: torch.Tensor) -> tuple[torch.Tensor, int, tuple[int, int]]:
        radius = len(self._drawn()) // 2
        height, width = (-(-(n + 2 * radius) // FFT_MULTIPLE) * FFT_MULTIPLE for n in like.shape[-2:])
        size = height, width
        return self._spectrum(size, like.dtype, like.device), radius, size

    def _drawn(self) -> torch.Tensor:
        if self.part is None:
            raise ValueError(f"{self.name} has no kernel yet: use for_image or with_part")
        return self.part

    def _spectrum_on(self, size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.fft.rfft2(self._drawn().to(device, dtype), s=size).conj().resolve_conj()


def fold_reflection(padded: torch.Tensor, radius: int) -> torch.Tensor:
    """Adjoint of reflecting rows: adds the ``radius`` outer ones of ``(..., H + 2 radius, W)`` to their originals."""
    if radius == 0:
        return padded
    inner = padded[..., radius:-radius, :].clone()
    inner[..., 1 : radius + 1, :] += padded[..., :radius, :].flip(-2)
    inner[..., -radius - 1 : -1, :] += padded[..., -radius:, :].flip(-2)
    return inner
