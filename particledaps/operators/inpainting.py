"""Inpainting: some pixels are not seen."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache

import torch

from particledaps.operators.operator import LinearOperator, NoiseFloor, check_noise, check_reference_side, pixels


class Inpainting(LinearOperator):
    r"""``A(x) = m x`` on images in [-1, 1] with a mask ``m`` of 0 and 1, the same for every channel.

    As in DAPS the measurement keeps the image's shape and unseen entries hold noise alone: they add a constant to the
    loss, which :meth:`noise_floor` knows from ``y``. In a measurement file ``mask`` is this mask of pixels; entries of
    ``y`` that were not even read are NaN (:mod:`particledaps.operators.measured`).

    Args:
        per_image: draw a mask for each image; False: one for all (DAPS).
        noise_sigma: standard deviation of the noise (range of images: [-1, 1]).
    """

    image_like, part_name = True, "mask"
    _placed: Callable[[torch.dtype, torch.device], torch.Tensor]

    def __init__(self, per_image: bool, noise_sigma: float) -> None:
        self.per_image, self.noise_sigma = per_image, check_noise(noise_sigma)

    def draw(self, image_shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
        """A mask ``(H, W)`` of 0 and 1."""
        raise NotImplementedError

    def for_image(self, image_shape: tuple[int, int, int], generator: torch.Generator) -> Inpainting:
        self.measurement_shape(image_shape)
        return self.with_part(self.draw(image_shape, generator))

    def with_part(self, part: torch.Tensor) -> Inpainting:
        if part.ndim != 2 or not ((part == 0) | (part == 1)).all():
            raise ValueError(
                f"mask of shape {tuple(part.shape)}: must be (H, W), 1 where a pixel is seen and 0 elsewhere"
            )
        bound = copy(self)
        bound.part = part.float()
        bound._placed = cache(bound._placed_on)
        return bound

    def mask(self, like: torch.Tensor) -> torch.Tensor:
        """The mask in the type and place of ``like``.

        Raises:
            ValueError: none was drawn or given, or it has another size.
        """
        part = self._drawn()
        if part.shape != like.shape[-2:]:
            raise ValueError(f"mask of {tuple(part.shape)} px does not fit images of {tuple(like.shape[-2:])} px")
        return self._placed(like.dtype, like.device)

    def _placed_on(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return self._drawn().to(device, dtype)

    def _drawn(self) -> torch.Tensor:
        if self.part is None:
            raise ValueError(f"{self.name} has no mask yet: use for_image or with_part")
        return self.part

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask(x)

    def adjoint(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        return y * self.mask(y)

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        return tuple(image_shape)

    def pseudo_inverse(self, y: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
        """``m y``: unseen pixels are mid-grey."""
        return y * self.mask(y)

    def noise_floor(self, y: torch.Tensor) -> NoiseFloor:
        r""":math:`n_{seen} \sigma^2 + \sum_{unseen} y^2 \pm \sigma^2 \sqrt{2 n_{seen}}`."""
        mask = self.mask(y)
        seen = mask.sum() * y.shape[1]
        mean = seen * self.noise_sigma**2 + (y * (1 - mask)).square().flatten(1).sum(1)
        return NoiseFloor(mean, torch.full_like(mean, self.noise_sigma**2) * (2 * seen).sqrt())

    def estimated_noise_sigma(self, y: torch.Tensor) -> torch.Tensor | None:
        """Root mean square of the unseen entries, ``(B,)``; None where they hold nothing."""
        unseen = (y * (1 - self.mask(y))).flatten(1)
        count = (1 - self.mask(y)).sum() * y.shape[1]
        return None if bool((unseen == 0).all()) else (unseen.square().sum(1) / count).sqrt()


class BoxInpainting(Inpainting):
    """A square box is not seen.

    (DAPS at 256 px: side 128, at least 32 px from the border, one box for all images.)

    Args:
        min_side: least side of the box, in pixels of an image of ``reference_side``.
        max_side: greatest side; the side is uniform between them.
        margin: least distance to the border, in the same pixels.
        reference_side: image side that lengths are given for; None: pixels of the image at hand.
        per_image: draw a box for each image; False: one for all (DAPS).
        noise_sigma: standard deviation of the noise (range of images: [-1, 1]).

    Raises:
        ValueError: a value is out of range.
    """

    name = "inpainting"

    def __init__(
        self,
        min_side: int = 128,
        max_side: int = 128,
        margin: int = 32,
        reference_side: int | None = 256,
        per_image: bool = True,
        noise_sigma: float = 0.05,
    ) -> None:
        super().__init__(per_image, noise_sigma)
        if min_side < 1:
            raise ValueError(f"min_side={min_side}: must be at least 1")
        if max_side < min_side:
            raise ValueError(f"max_side={max_side}: must be at least min_side={min_side}")
        if margin < 0:
            raise ValueError(f"margin={margin}: must be at least 0")
        self.min_side = min_side
        self.max_side = max_side
        self.margin = margin
        self.reference_side = check_reference_side(reference_side)

    def measurement_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        _, largest, margin = self._lengths(image_shape)
        if largest + 2 * margin > min(image_shape[1:]):
            raise ValueError(
                f"max_side={self.max_side}: a box of {largest} px with margins of {margin} px does not fit images of "
                f"{image_shape[1]}x{image_shape[2]} px"
            )
        return tuple(image_shape)

    def draw(self, image_shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
        smallest, largest, margin = self._lengths(image_shape)
        side = _uniform(smallest, largest + 1, generator)
        top, left = (_uniform(margin, max(n - margin - side, margin + 1), generator) for n in image_shape[1:])
        mask = torch.ones(image_shape[1:])
        mask[top : top + side, left : left + side] = 0
        return mask

    def _lengths(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        lengths = (self.min_side, self.max_side, self.margin)
        smallest, largest, margin = (round(pixels(v, image_shape, self.reference_side)) for v in lengths)
        return max(smallest, 1), max(largest, 1), margin


class RandomInpainting(Inpainting):
    """A random share of the pixels is not seen.

    (DAPS: 0.70 to 0.71, one mask for all images.)

    Args:
        min_fraction: least share of unseen pixels.
        max_fraction: greatest share; the share is uniform between them.
        per_image: draw a mask for each image; False: one for all (DAPS).
        noise_sigma: standard deviation of the noise (range of images: [-1, 1]).

    Raises:
        ValueError: a value is out of range.
    """

    name = "inpainting_rand"

    def __init__(
        self,
        min_fraction: float = 0.70,
        max_fraction: float = 0.71,
        per_image: bool = True,
        noise_sigma: float = 0.05,
    ) -> None:
        super().__init__(per_image, noise_sigma)
        if not 0 <= min_fraction < 1:
            raise ValueError(f"min_fraction={min_fraction}: must be at least 0 and below 1")
        if not min_fraction <= max_fraction < 1:
            raise ValueError(f"max_fraction={max_fraction}: must be at least min_fraction={min_fraction} and below 1")
        self.min_fraction, self.max_fraction = float(min_fraction), float(max_fraction)

    def draw(self, image_shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
        spread = self.max_fraction - self.min_fraction
        fraction = self.min_fraction + spread * torch.rand((), generator=generator, dtype=torch.float64).item()
        mask = torch.ones(image_shape[1] * image_shape[2])
        order = torch.randperm(len(mask), generator=generator)
        mask[order[: int(fraction * len(mask))]] = 0
        return mask.reshape(image_shape[1:])


def _uniform(low: int, high: int, generator: torch.Generator) -> int:
    """A whole number in ``[low, high)``."""
    return int(torch.randint(low, high, (), generator=generator))
