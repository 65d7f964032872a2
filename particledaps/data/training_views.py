"""Training images with random zooms, drawn so that batch ``k`` depends on the seed and ``k`` only."""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from particledaps.checks import DataError
from particledaps.data.image_folder import image_files
from particledaps.data.image_sets import load_image, npz_training, to_tensor
from particledaps.data.npz import Archive


def step_generator(seed: int, step: int) -> torch.Generator:
    """The CPU generator of training step ``step``: resuming needs no generator state."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@dataclass(frozen=True)
class TrainingImages:
    """Training and validation images of one resolution ``R``.

    Attributes:
        images: ``(N, 3, R, R)`` uint8.
        large: ``(N, 3, 2R, 2R)`` uint8 of the same images, for random zooms; or None.
        validation: ``(V, 3, R, R)`` float32 in [-1, 1], never trained on.
        zoom: probability that a sample is a random crop of ``large``.
        min_crop: smallest crop side as a fraction of the full frame.
        close_up: probability that a sample is a crop about the middle of ``large``: its side at most half way
            between ``min_crop`` and the full frame, its centre within the middle half of the free range.
    """

    images: torch.Tensor
    large: torch.Tensor | None
    validation: torch.Tensor
    zoom: float = 0.5
    min_crop: float = 0.5
    close_up: float = 0.0

    def batch(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(size, 3, R, R)`` float32 in [-1, 1] with horizontal mirroring and random zooms.

        No vertical flips and no rotations: the prior must know which way is up.
        """
        index = torch.randint(len(self.images), (size,), generator=generator)
        mirror = torch.rand(size, generator=generator) < 0.5
        kind = torch.rand(size, generator=generator)  # [0, zoom) crop anywhere, [zoom, zoom + close_up) close-up
        boxes = torch.rand(size, 3, generator=generator)
        close = (kind >= self.zoom) & (kind < self.zoom + self.close_up)
        boxes[close] = boxes[close] * 0.5 + torch.tensor([0.0, 0.25, 0.25])
        cropped = (kind < self.zoom + self.close_up) if self.large is not None else torch.zeros(size, dtype=torch.bool)
        batch = self.images[index].float()
        for row in torch.nonzero(cropped).flatten().tolist():
            batch[row] = self._crop(int(index[row]), boxes[row])
        batch[mirror] = batch[mirror].flip(-1)
        return batch / 127.5 - 1

    def _crop(self, index: int, box: torch.Tensor) -> torch.Tensor:
        large, resolution = self.large[index], self.images.shape[-1]
        full = large.shape[-1]
        side = round(full * (self.min_crop + (1 - self.min_crop) * box[0].item()))
        top, left = (round((full - side) * b.item()) for b in box[1:])
        crop = large[None, :, top : top + side, left : left + side].float()
        size = (resolution, resolution)
        return torch.nn.functional.interpolate(crop, size, mode="bicubic", antialias=True)[0].clamp(0, 255)


def load_training_images(
    path: Path, large_path: Path | None, resolution: int, zoom: float, min_crop: float, close_up: float = 0.0
) -> TrainingImages:
    """Load a folder of images or an ``.npz`` file (``train_images``, optional ``train_dupgroup``).

    Args:
        path: folder or ``.npz`` file.
        large_path: for an ``.npz``: a second file with the same images as JPEG bytes
            (``train_bytes``, ``train_offsets``) at twice the resolution. A folder needs none.
        resolution: side ``R`` in pixels.
        zoom: see :class:`TrainingImages`.
        min_crop: see :class:`TrainingImages`.
        close_up: see :class:`TrainingImages`.

    Raises:
        DataError: the files cannot be read or do not fit, or too few images are left to train on.
    """
    if path.is_dir():
        return _from_folder(path, resolution, zoom, min_crop, close_up)
    images, held_out = npz_training(path)
    train, validation = np.delete(images, held_out, axis=0), images[held_out]
    if train.shape[1:] != (resolution, resolution, 3):
        raise DataError(f"{path} holds images of shape {train.shape[1:]}, the prior needs {resolution} px RGB")
    if len(train) == 0:
        raise DataError(f"{path}: all {len(validation)} images are held out for validation, none is left to train on")
    large = None
    if large_path is not None:
        everything = _decode_jpegs(large_path)
        if len(everything) != len(images):
            raise DataError(f"{large_path} holds {len(everything)} images, {path} {len(images)}")
        large = _channels_first(np.delete(everything, held_out, axis=0))
    return TrainingImages(_channels_first(train), large, to_tensor(validation), zoom, min_crop, close_up)


def _from_folder(path: Path, resolution: int, zoom: float, min_crop: float, close_up: float) -> TrainingImages:
    files = image_files(path)
    if len(files) < 2:
        raise DataError(f"{path} holds {len(files)} image: a training needs at least 2, one of them held out")
    held_out = set(range(0, len(files), max(len(files) // 150, 10)))
    small = np.stack([_eight_bits(f, resolution) for f in files])
    large = np.stack([_eight_bits(f, 2 * resolution) for f in files])
    rest = [i for i in range(len(files)) if i not in held_out]
    validation = to_tensor(small[sorted(held_out)])
    return TrainingImages(
        _channels_first(small[rest]), _channels_first(large[rest]), validation, zoom, min_crop, close_up
    )


def _eight_bits(path: Path, resolution: int) -> np.ndarray:
    return np.round(load_image(path, resolution)).astype(np.uint8)  # deeper pictures arrive as floats in [0, 255]


def _decode_jpegs(path: Path) -> np.ndarray:
    with Archive(path) as archive:
        data, offsets = archive.read("train_bytes"), archive.read("train_offsets")
    pieces = (data[a:b].tobytes() for a, b in itertools.pairwise(offsets))
    return np.stack([np.asarray(Image.open(io.BytesIO(piece)).convert("RGB")) for piece in pieces])


def _channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
