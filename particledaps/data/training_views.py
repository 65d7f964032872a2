"""Training images with random zooms, drawn so that batch ``k`` depends on the seed and ``k`` only."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from particledaps.checks import DataError
from particledaps.data.image_folder import image_files
from particledaps.data.image_set import to_tensor
from particledaps.data.labels import Labels, folder_labels, npz_labels
from particledaps.data.npz import Archive
from particledaps.data.npz_images import npz_training
from particledaps.data.picture_files import is_grey, load_image


def step_generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of training step ``step``: resuming needs no generator state."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


@dataclass(frozen=True)
class Augmentation:
    """How training views differ from the images. Nothing is turned: the prior must know which way is up.

    Attributes:
        zoom: probability that a sample is a random crop of the large image.
        min_crop: smallest crop side as a fraction of the full frame.
        close_up: probability that a sample is a crop about the middle of the large image: its side at most half way
            between ``min_crop`` and the full frame, its centre within the middle half of the free range.
        mirror: are half of the samples mirrored left to right?
    """

    zoom: float = 0.5
    min_crop: float = 0.5
    close_up: float = 0.0
    mirror: bool = True


@dataclass(frozen=True)
class TrainingImages:
    """Training and validation images of one resolution ``R``.

    Attributes:
        images: ``(N, C, R, R)`` uint8.
        large: ``(N, C, 2R, 2R)`` uint8 of the same images, for random zooms; or None.
        validation: ``(V, C, R, R)`` float32 in [-1, 1], never trained on.
        augmentation: what the views may be.
        labels: ``(N,)`` classes of ``images``, or None.
        class_names: of the labels.
    """

    images: torch.Tensor
    large: torch.Tensor | None
    validation: torch.Tensor
    augmentation: Augmentation = Augmentation()
    labels: torch.Tensor | None = None
    class_names: tuple[str, ...] = ()

    def batch(self, size: int, generator: torch.Generator) -> torch.Tensor:
        """Draw ``(size, C, R, R)`` float32 in [-1, 1], augmented."""
        return self.labelled_batch(size, generator)[0]

    def labelled_batch(self, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As :meth:`batch`, with the classes ``(size,)`` where there are some."""
        views, zoom = self.augmentation, self.augmentation.zoom
        index = torch.randint(len(self.images), (size,), generator=generator)
        mirror = (torch.rand(size, generator=generator) < 0.5) & views.mirror
        kind = torch.rand(size, generator=generator)  # [0, zoom) crop anywhere, [zoom, zoom + close_up) close-up
        boxes = torch.rand(size, 3, generator=generator)
        close = (kind >= zoom) & (kind < zoom + views.close_up)
        boxes[close] = boxes[close] * 0.5 + torch.tensor([0.0, 0.25, 0.25])
        cropped = (kind < zoom + views.close_up) if self.large is not None else torch.zeros(size, dtype=torch.bool)
        batch = self.images[index].float()
        for row in torch.nonzero(cropped).flatten().tolist():
            batch[row] = self._crop(int(index[row]), boxes[row])
        batch[mirror] = batch[mirror].flip(-1)
        return batch / 127.5 - 1, None if self.labels is None else self.labels[index]

    def _crop(self, index: int, box: torch.Tensor) -> torch.Tensor:
        assert self.large is not None
        large, resolution = self.large[index], self.images.shape[-1]
        full, least = large.shape[-1], self.augmentation.min_crop
        side = round(full * (least + (1 - least) * box[0].item()))
        top, left = (round((full - side) * b.item()) for b in box[1:])
        crop = large[None, :, top : top + side, left : left + side].float()
        size = (resolution, resolution)
        return torch.nn.functional.interpolate(crop, size, mode="bicubic", antialias=True)[0].clamp(0, 255)


def load_training_images(
    path: Path, large_path: Path | None, resolution: int, augmentation: Augmentation, channels: int | None = None
) -> TrainingImages:
    """Load a folder of images or an ``.npz`` file (``train_images``, optional ``train_dupgroup``, ``train_labels``).

    Args:
        path: folder or ``.npz`` file.
        large_path: for an ``.npz``: a second file with the same images as JPEG bytes
            (``train_bytes``, ``train_offsets``) at twice the resolution. A folder needs none.
        resolution: side ``R`` in pixels.
        augmentation: what the views may be.
        channels: of the pictures of a folder, 1 or 3; None: 1 if all are grey. An ``.npz`` has those of its array.

    Raises:
        DataError: the files cannot be read or do not fit, or too few images are left to train on.
    """
    if path.is_dir():
        return _from_folder(path, resolution, augmentation, channels)
    images, held_out = npz_training(path)
    labels = npz_labels(path, len(images))
    train, validation = np.delete(images, held_out, axis=0), images[held_out]
    if train.shape[1:3] != (resolution, resolution):
        raise DataError(f"{path} holds images of shape {train.shape[1:]}, resolution={resolution} needs that side")
    if channels not in (None, train.shape[3]):
        raise DataError(f"{path} holds images of {train.shape[3]} channels, not channels={channels}")
    if len(train) == 0:
        raise DataError(f"{path}: all {len(validation)} images are held out for validation, none is left to train on")
    large = None
    if large_path is not None:
        everything = _decode_jpegs(large_path, train.shape[3])
        if len(everything) != len(images):
            raise DataError(f"{large_path} holds {len(everything)} images, {path} {len(images)}")
        large = _channels_first(np.delete(everything, held_out, axis=0))
    kept = _of_rows(labels, np.delete(np.arange(len(images)), held_out))
    return TrainingImages(_channels_first(train), large, to_tensor(validation), augmentation, *kept)


def _from_folder(path: Path, resolution: int, augmentation: Augmentation, channels: int | None) -> TrainingImages:
    files = image_files(path)
    if len(files) < 2:
        raise DataError(f"{path} holds {len(files)} image: a training needs at least 2, one of them held out")
    count = channels or (1 if all(is_grey(file) for file in files) else 3)
    held_out = set(range(0, len(files), max(len(files) // 150, 10)))
    small = np.stack([_eight_bits(f, resolution, count) for f in files])
    large = np.stack([_eight_bits(f, 2 * resolution, count) for f in files])
    rest = [i for i in range(len(files)) if i not in held_out]
    return TrainingImages(
        _channels_first(small[rest]),
        _channels_first(large[rest]),
        to_tensor(small[sorted(held_out)]),
        augmentation,
        *_of_rows(folder_labels(path, files), rest),
    )


def _of_rows(labels: Labels | None, rows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor | None, tuple[str, ...]]:
    """Classes of some images, and the names of all classes."""
    return (None, ()) if labels is None else (torch.from_numpy(labels.values[rows]), labels.names)


def _eight_bits(path: Path, resolution: int, channels: int) -> np.ndarray:
    pixels = load_image(path, resolution, channels)
    return np.round(pixels).astype(np.uint8)  # deeper pictures arrive as floats in [0, 255]


def _decode_jpegs(path: Path, channels: int) -> np.ndarray:
    if channels not in (1, 3):
        raise DataError(f"{path}: JPEG files have 1 or 3 channels, the images have {channels}: leave it out")
    with Archive(path) as archive:
        data, offsets = archive.read("train_bytes"), archive.read("train_offsets")
    pieces, mode = (data[a:b].tobytes() for a, b in itertools.pairwise(offsets)), "L" if channels == 1 else "RGB"
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(piece)).convert(mode)) for piece in pieces])
    return pictures.reshape(*pictures.shape[:3], channels)


def _channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
