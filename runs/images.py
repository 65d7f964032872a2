"""Images from a folder, an ``.npz`` file or the demo set, as float tensors in [-1, 1].

Grey, RGBA, 16-bit, EXIF-rotated and non-square files are converted: transparency is laid on white,
16-bit is scaled to 8-bit range as float, the centre square is cut and resized (Lanczos).
"""

import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
DAMAGED_IMAGE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)
DAMAGED_NPZ = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
NUM_VALIDATION_GROUPS = 150
DEMO_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "demo"
PHOTOGRAPHS = {"chelsea": (0.63, 0.5), "astronaut": (0.5, 0.5), "coffee": (0.5, 0.5)}
"""Of scikit-image, with the centre of the square that is cut; the cat's is the middle between its eyes."""
LARGEST_SYNTHETIC = 128
"""The synthetic cats have half this side, and are enlarged no further."""


class DataError(ValueError):
    """The images that a run asks for cannot be used; the message says which and why."""


@dataclass(frozen=True)
class ImageSet:
    """Named images of one size.

    Attributes:
        pixels: ``(N, C, R, R)`` float32 in [-1, 1], or None where only measurements exist.
        ids: id of each image in its data set (its random streams hang on it), not its position here.
        names: one short name each, used in file names.
        origins: ``photograph``, ``synthetic`` (drawn from the prior) or ``data``.
    """

    pixels: torch.Tensor
    ids: tuple[int, ...]
    names: tuple[str, ...]
    origins: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


def to_unit_float(image: Image.Image) -> Image.Image:
    """Undo EXIF rotation, transparency and 16-bit depth: an 8-bit ``L`` or ``RGB`` image."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        image = Image.fromarray(np.clip(np.round(values / top * 255), 0, 255).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "L" else image.convert("RGB")


def load_image(path: Path, resolution: int, channels: int = 3) -> np.ndarray:
    """Read one file as a ``(resolution, resolution, channels)`` uint8 array.

    Raises:
        DataError: the file is no readable image, or its shorter side is below ``resolution // 2``.
    """
    try:
        with Image.open(path) as opened:
            image = to_unit_float(opened)
    except DAMAGED_IMAGE as error:
        raise DataError(f"{path} is not a readable image: {error}") from error
    if min(image.size) < resolution // 2:
        raise DataError(
            f"{path} is {image.size[0]}x{image.size[1]} px: too small for a {resolution} px prior "
            f"(at least {resolution // 2} px on the shorter side)"
        )
    image = image.convert("L" if channels == 1 else "RGB")
    square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(resolution, resolution, channels)


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """``(N, H, W, C)`` uint8 -> ``(N, C, H, W)`` float32 in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def image_files(folder: Path) -> list[Path]:
    """Image files below ``folder`` in natural order (``2.png`` before ``10.png``)."""
    if not folder.is_dir():
        raise DataError(f"data.dir={folder} is not a folder")
    found = [p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()]
    if not found:
        raise DataError(f"data.dir={folder} holds no image ({', '.join(sorted(SUFFIXES))})")

    def natural(path: Path) -> tuple[list[object], str]:
        name = str(path.relative_to(folder))
        parts = re.split(r"(\d+)", name.lower())  # text and digits alternate
        return [int(p) if i % 2 else p for i, p in enumerate(parts)], name  # the name itself parts 1.png and 01.png

    return sorted(found, key=natural)


def open_npz(path: Path) -> np.lib.npyio.NpzFile:
    """Open an ``.npz`` without unpickling anything.

    Raises:
        DataError: the file is missing or is not an ``.npz`` archive.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    try:
        archive = np.load(path, allow_pickle=False)
    except DAMAGED_NPZ as error:
        raise DataError(f"{path} is not a readable .npz file: {error}") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{path} is not an .npz archive")
    return archive


def read_array(archive: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    """One array of an archive, or a DataError that lists what it holds."""
    if key not in archive.files:
        raise DataError(f"{path} has no array '{key}' (it holds {', '.join(archive.files)})")
    try:
        return archive[key]
    except DAMAGED_NPZ as error:
        raise DataError(f"{path}: array '{key}' is damaged: {error}") from error


def validation_indices(groups: np.ndarray, num_groups: int = NUM_VALIDATION_GROUPS) -> np.ndarray:
    """Indices of ``num_groups`` whole near-duplicate groups, always the same ones.

    Args:
        groups: ``(N,)`` group id of each training image.
        num_groups: how many groups are held out.
    """
    chosen = np.random.default_rng(0).permutation(np.unique(groups))[:num_groups]
    return np.flatnonzero(np.isin(groups, chosen))


def npz_training(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """``train_images`` ``(N, H, W, C)`` of an ``.npz`` file and the indices held out as validation.

    Near-duplicate groups (``train_dupgroup``) stay whole; without them every image is its own group.
    """
    with open_npz(path) as archive:
        images = read_array(archive, "train_images", path)
        has_groups = "train_dupgroup" in archive.files
        groups = read_array(archive, "train_dupgroup", path) if has_groups else np.arange(len(images))
    if groups.shape != (len(images),):
        raise DataError(f"{path}: train_dupgroup has shape {groups.shape}, expected ({len(images)},)")
    return _as_images(images, path), validation_indices(groups)


def npz_split(path: Path, split: str) -> np.ndarray:
    """Images ``(N, H, W, C)`` uint8 of split ``test``, ``validation`` or ``train`` of an ``.npz`` file."""
    if split == "test":
        with open_npz(path) as archive:
            return _as_images(read_array(archive, "test_images", path), path)
    images, held_out = npz_training(path)
    return images[held_out] if split == "validation" else np.delete(images, held_out, axis=0)


def _as_images(images: np.ndarray, path: Path) -> np.ndarray:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError(f"{path}: images must be uint8 (N, H, W[, C]), not {images.dtype} {images.shape}")
    return images if images.ndim == 4 else images[..., None]


def demo_images(resolution: int, channels: int = 3) -> ImageSet:
    """The photograph of a cat that scikit-image ships, and cats drawn from the embedded prior (synthetic).

    Those have 64 px: above 128 px two more photographs take their place.
    """
    files = sorted(DEMO_FOLDER.glob("synthetic_*.png")) if resolution <= LARGEST_SYNTHETIC else []
    photographs = list(PHOTOGRAPHS)[: 1 if files else None]
    arrays = [_photograph(name, resolution, channels) for name in photographs]
    arrays += [load_image(path, resolution, channels) for path in files]
    names = (*photographs, *(path.stem for path in files))
    origins = ("photograph",) * len(photographs) + ("synthetic",) * len(files)
    return ImageSet(to_tensor(np.stack(arrays)), tuple(range(len(arrays))), names, origins)


def _photograph(name: str, resolution: int, channels: int) -> np.ndarray:
    import skimage.data

    image = Image.fromarray(getattr(skimage.data, name)()).convert("L" if channels == 1 else "RGB")
    size, centre = (resolution, resolution), PHOTOGRAPHS[name]
    square = ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=centre)
    return np.asarray(square).reshape(resolution, resolution, channels)


def select_ids(images: ImageSet, start_id: int, end_id: int | None) -> ImageSet:
    """Images ``start_id`` to ``end_id - 1``.

    Raises:
        DataError: the range leaves the data set.
    """
    total = len(images)
    if total == 0:
        raise DataError("the data set holds no image")
    stop = total if end_id is None else end_id
    if not 0 <= start_id < stop <= total:
        raise DataError(
            f"data.start_id={start_id}, data.end_id={end_id}: the data set has ids 0 to {total - 1} "
            f"(end_id is one past the last, at most {total})"
        )
    part = slice(start_id, stop)
    return ImageSet(images.pixels[part], images.ids[part], images.names[part], images.origins[part])


def load_images(
    kind: str, dir: str | None, path: str | None, split: str, start_id: int, end_id: int | None, shape: tuple[int, ...]
) -> ImageSet:
    """The images that ``data=`` asks for, as the prior needs them.

    Args:
        kind: ``demo``, ``folder`` or ``npz``.
        dir: the folder.
        path: the ``.npz`` file.
        split: its split.
        start_id: first id.
        end_id: one past the last id, or None.
        shape: ``(C, R, R)`` of the prior's images.
    """
    channels, resolution = shape[0], shape[-1]
    if kind == "demo":
        return select_ids(demo_images(resolution, channels), start_id, end_id)
    if kind == "folder":
        files = image_files(Path(dir))
        placeholder = torch.empty(len(files), 0)
        chosen = select_ids(
            ImageSet(placeholder, tuple(range(len(files))), tuple(f.stem for f in files), ("data",) * len(files)),
            start_id,
            end_id,
        )
        arrays = [load_image(files[i], resolution, channels) for i in chosen.ids]
        return ImageSet(to_tensor(np.stack(arrays)), chosen.ids, chosen.names, chosen.origins)
    arrays = npz_split(Path(path), split)
    ids = tuple(range(len(arrays)))
    everything = ImageSet(to_tensor(arrays), ids, tuple(f"{split}_{i:05d}" for i in ids), ("data",) * len(ids))
    if everything.pixels.shape[1:] != tuple(shape):
        raise DataError(f"{path} holds images of shape {tuple(everything.pixels.shape[1:])}, the prior needs {shape}")
    return select_ids(everything, start_id, end_id)


def load_measurements(
    path: Path, shape: tuple[int, ...], start_id: int = 0, end_id: int | None = None
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Measurements ``y`` ``(N, ...)`` and their image ids from an ``.npz`` (``y``, optional ``image_ids``).

    Args:
        path: the file.
        shape: shape of one measurement.
        start_id: ids below it are left out.
        end_id: ids from it on are left out, unless None.

    Raises:
        DataError: the file, an array or the ids do not fit.
    """
    with open_npz(path) as archive:
        y = read_array(archive, "y", path)
        given = "image_ids" in archive.files
        ids = read_array(archive, "image_ids", path) if given else np.arange(len(y) if y.ndim else 0)
    if y.dtype.kind not in "fiu" or y.ndim == 0 or y.shape[1:] != tuple(shape):
        raise DataError(f"{path}: y is {y.dtype} {y.shape}, expected real numbers (N, {', '.join(map(str, shape))})")
    y = y.astype(np.float32)
    if not np.isfinite(y).all():
        raise DataError(f"{path}: y holds NaN or infinite values")
    if ids.dtype.kind not in "iu" or ids.shape != (len(y),) or len(np.unique(ids)) < len(ids) or (ids < 0).any():
        raise DataError(f"{path}: image_ids must be {len(y)} distinct whole numbers from 0, one a measurement")
    chosen = (ids >= start_id) & (ids < end_id if end_id is not None else True)
    if not chosen.any():
        raise DataError(f"data.start_id={start_id}, data.end_id={end_id}: {path} has the ids {ids.tolist()[:20]}")
    return torch.from_numpy(y[chosen]), tuple(ids[chosen].tolist())
