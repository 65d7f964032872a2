"""Images from a folder, an ``.npz`` file or the demo set, as float tensors in [-1, 1].

Grey, RGBA, 16-bit, EXIF-rotated and non-square files are converted: transparency is laid on white,
16-bit is scaled to 8-bit range as float, the centre square is cut and resized (Lanczos).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from particledaps.checkout import ROOT
from particledaps.checks import DataError
from particledaps.checksums import sha256_of
from particledaps.data.image_folder import assign_ids, image_files
from particledaps.data.labels import folder_labels, split_labels
from particledaps.data.npz import Archive
from particledaps.data.pixel_values import PixelError, deep_planes, fit_planes
from particledaps.data.sources import Source, arrays_sha256
from particledaps.data.upright import upright

if TYPE_CHECKING:  # its import takes seconds; checksums need none of it
    import torch

    from particledaps.settings.schema import DataSettings

DAMAGED_IMAGE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)
NUM_VALIDATION_GROUPS = 150
BLOCK = 256
"""Rows of an archive that are read at once."""
DEMO_FOLDER = ROOT / "assets" / "demo"
PHOTOGRAPHS = {"chelsea": (0.63, 0.5), "astronaut": (0.5, 0.5), "coffee": (0.5, 0.5)}
"""Of scikit-image, with the centre of the square that is cut; the cat's is the middle between its eyes."""
LARGEST_SYNTHETIC = 128
"""The synthetic cats have half this side, and are enlarged no further."""


@dataclass(frozen=True)
class ImageSet:
    """Named images of one size, each read when it is needed.

    Attributes:
        ids: id of each image in its data set (its random streams hang on it), not its position here.
        names: one short name each, used in file names.
        origins: ``photograph``, ``synthetic`` (drawn from the prior) or ``data``.
        read: position -> ``(R, R, C)`` on the scale 0 to 255.
        source: position -> what it is read from.
        read_labels: see :meth:`labels`.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    origins: tuple[str, ...]
    read: Callable[[int], np.ndarray]
    source: Callable[[int], Source]
    read_labels: Callable[[], np.ndarray | None] = lambda: None

    def labels(self) -> np.ndarray | None:
        """Class of each image ``(N,)`` int64; None where the data have none.

        Raises:
            DataError: they are no whole numbers, one an image.
        """
        return self.read_labels()

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, position: int) -> torch.Tensor:
        """``(1, C, R, R)`` float32 in [-1, 1]."""
        return to_tensor(self.read(position)[None])

    @property
    def pixels(self) -> torch.Tensor:
        """All of them, ``(N, C, R, R)``."""
        import torch

        return torch.cat([self.image(position) for position in range(len(self))])


def to_unit_float(image: Image.Image) -> Image.Image:
    """Undo EXIF rotation and transparency of a picture with at most 8 bits: an 8-bit ``L`` or ``RGB`` image."""
    image = upright(image)
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "L" else image.convert("RGB")


def load_image(path: Path, resolution: int, channels: int = 3, bit_depth: int | None = None) -> np.ndarray:
    """Read one file as a ``(resolution, resolution, channels)`` array on the scale 0 to 255.

    Args:
        path: the file.
        resolution: side in pixels.
        channels: 1 or 3.
        bit_depth: bits of integers in files with more than 8, over what the file says of itself.

    Returns:
        uint8, or float32 for a picture with more than 8 bits or of floats: it keeps its precision.

    Raises:
        DataError: the file is no readable image, its shorter side is below ``resolution // 2``, or its numbers are no
            grey levels (see :func:`particledaps.data.pixel_values.deep_planes`).
    """
    try:
        with Image.open(path) as opened:
            opened.filename = ""  # else Pillow maps a turned TIFF into memory with its sides swapped
            deep = deep_planes(opened, path, bit_depth)
            planes = [to_unit_float(opened)] if deep is None else deep
    except PixelError as error:
        raise DataError(f"{path}: {error}") from error
    except DAMAGED_IMAGE as error:
        raise DataError(f"{path} is not a readable image: {error}") from error
    width, height = planes[0].size
    if min(width, height) < resolution // 2:
        raise DataError(
            f"{path} is {width}x{height} px: too small for a {resolution} px prior "
            f"(at least {resolution // 2} px on the shorter side)"
        )
    if deep is not None:
        return fit_planes(deep, resolution, channels)
    image = planes[0].convert("L" if channels == 1 else "RGB")
    square = ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(resolution, resolution, channels)


def is_grey(path: Path) -> bool:
    """Does a picture say that it holds grey levels only? A damaged one is left to :func:`load_image`."""
    try:
        with Image.open(path) as opened:
            return opened.getbands() in (("1",), ("L",), ("I",), ("F",), ("L", "A")) or opened.mode.startswith("I;16")
    except DAMAGED_IMAGE:
        return True


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """``(N, H, W, C)`` uint8 -> ``(N, C, H, W)`` float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


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
    with Archive(path) as archive:
        held_out = _held_out(archive, _num_images(archive, "train_images"))
        return _with_channels(archive.read("train_images")), held_out


def npz_split(path: Path, split: str) -> np.ndarray:
    """Images ``(N, H, W, C)`` uint8 of split ``test``, ``validation`` or ``train`` of an ``.npz`` file."""
    with Archive(path) as archive:
        name, rows = _split_rows(archive, split)
        return _with_channels(archive.read(name, rows))


def _split_rows(archive: Archive, split: str) -> tuple[str, list[int]]:
    """The array that holds a split, and the rows of it."""
    name = _split_array(split)
    count = _num_images(archive, name)
    if split == "test":
        return name, list(range(count))
    held_out = _held_out(archive, count)
    chosen = held_out if split == "validation" else np.delete(np.arange(count), held_out)
    return name, chosen.tolist()


def _split_array(split: str) -> str:
    return "test_images" if split == "test" else "train_images"


def _held_out(archive: Archive, count: int) -> np.ndarray:
    if "train_dupgroup" not in archive.files:
        return validation_indices(np.arange(count))
    shape, _ = archive.header("train_dupgroup")
    if shape != (count,):
        raise DataError(f"{archive.path}: train_dupgroup has shape {shape}, expected ({count},)")
    return validation_indices(archive.read("train_dupgroup"))


def _num_images(archive: Archive, name: str) -> int:
    shape, dtype = archive.header(name)
    if dtype != np.uint8 or len(shape) not in (3, 4):
        raise DataError(f"{archive.path}: images must be uint8 (N, H, W[, C]), not {dtype} {shape}")
    return shape[0]


def _with_channels(images: np.ndarray) -> np.ndarray:
    return images if images.ndim == 4 else images[..., None]


def demo_images(resolution: int, channels: int = 3) -> ImageSet:
    """The photograph of a cat that scikit-image ships, and cats drawn from the embedded prior (synthetic).

    Those have 64 px: above 128 px two more photographs take their place.
    """
    drawn = sorted(DEMO_FOLDER.glob("synthetic_*.png")) if resolution <= LARGEST_SYNTHETIC else []
    names = (*list(PHOTOGRAPHS)[: 1 if drawn else None], *(path.stem for path in drawn))

    def read(position: int) -> np.ndarray:
        name = names[position]
        if name in PHOTOGRAPHS:
            return _photograph(name, resolution, channels)
        return load_image(demo_file(name), resolution, channels)

    origins = tuple("photograph" if name in PHOTOGRAPHS else "synthetic" for name in names)
    return ImageSet(tuple(range(len(names))), names, origins, read, lambda position: demo_source(names[position]))


def demo_file(name: str) -> Path:
    """The file of an image of the demo."""
    if name not in PHOTOGRAPHS:
        return DEMO_FOLDER / f"{name}.png"
    return Path(find_spec("skimage").submodule_search_locations[0]) / "data" / f"{name}.png"


def demo_source(name: str) -> Source:
    """What an image of the demo is read from."""
    return Source(name, sha256_of(demo_file(name)))


def _photograph(name: str, resolution: int, channels: int) -> np.ndarray:
    import skimage.data

    image = Image.fromarray(getattr(skimage.data, name)()).convert("L" if channels == 1 else "RGB")
    size, centre = (resolution, resolution), PHOTOGRAPHS[name]
    square = ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=centre)
    return np.asarray(square).reshape(resolution, resolution, channels)


def select_ids(ids: Iterable[int], start_id: int, end_id: int | None) -> list[int]:
    """Those of ``ids`` from ``start_id`` to ``end_id - 1``, in ascending order.

    Raises:
        DataError: the range leaves the data set.
    """
    known = sorted(ids)
    if not known:
        raise DataError("the data set holds no image")
    total = known[-1] + 1
    stop = total if end_id is None else end_id
    chosen = [i for i in known if start_id <= i < stop]
    if not 0 <= start_id < stop <= total or not chosen:
        raise DataError(
            f"data.start_id={start_id}, data.end_id={end_id}: the data set has ids {known[0]} to {total - 1} "
            f"(end_id is one past the last, at most {total})"
        )
    return chosen


def load_images(
    data: DataSettings, shape: tuple[int, ...], ids: Mapping[str, int] | None = None, leave_out: Iterable[Path] = ()
) -> ImageSet:
    """The images that ``data=`` asks for, as the prior needs them.

    Args:
        data: which images.
        shape: ``(C, R, R)`` of the prior's images.
        ids: of a folder's files, by their paths below it; None: as in a new run.
        leave_out: folders that hold no data.

    Raises:
        DataError: they cannot be used.
    """
    if data.kind == "npz":
        return _npz_images(data, shape)
    _refuse_other_channels(data.kind, shape)
    if data.kind == "folder":
        return folder_images(data, shape, ids, leave_out)
    everything = demo_images(shape[-1], shape[0])
    return _part(everything, select_ids(everything.ids, data.start_id, data.end_id))


def _part(images: ImageSet, ids: Sequence[int]) -> ImageSet:
    """Those of ``ids``, which are positions."""
    names, origins = (tuple(field[i] for i in ids) for field in (images.names, images.origins))
    return ImageSet(tuple(ids), names, origins, lambda k: images.read(ids[k]), lambda k: images.source(ids[k]))


def _refuse_other_channels(kind: str, shape: tuple[int, ...]) -> None:
    """Pictures are grey or coloured; other priors take arrays.

    Raises:
        DataError: the prior's images have another number of channels.
    """
    if shape[0] not in (1, 3):
        raise DataError(
            f"data={kind}: the prior's images have {shape[0]} channels, pictures have 1 or 3; use data=npz or "
            "data.measurement"
        )


def folder_images(
    data: DataSettings, shape: tuple[int, ...], ids: Mapping[str, int] | None, leave_out: Iterable[Path] = ()
) -> ImageSet:
    """The pictures of a folder that are asked for, see :func:`load_images`."""
    folder = Path(data.dir)
    if ids is None:
        ids = assign_ids(folder, image_files(folder, leave_out), {})
    paths = {image_id: name for name, image_id in ids.items()}
    chosen = select_ids(paths, data.start_id, data.end_id)
    files = [folder / paths[i] for i in chosen]

    def read(position: int) -> np.ndarray:
        return load_image(files[position], shape[-1], shape[0], data.bit_depth)

    def source(position: int) -> Source:
        try:
            return Source(paths[chosen[position]], sha256_of(files[position]))
        except OSError as error:
            raise DataError(f"{files[position]} cannot be read: {error.strerror}") from error

    def labels() -> np.ndarray | None:
        everything = sorted(paths)
        found = folder_labels(folder, [folder / paths[i] for i in everything])
        return None if found is None else found.values[np.isin(everything, chosen)]

    return ImageSet(tuple(chosen), tuple(f.stem for f in files), ("data",) * len(files), read, source, labels)


class _Rows:
    """Rows of an array of an archive, read in blocks: a compressed one is unfolded from its start every time."""

    def __init__(self, path: Path, name: str, rows: Sequence[int]) -> None:
        self.path = path
        self.name = name
        self.rows = rows
        self.first, self.block = 0, np.empty((0,))

    def __call__(self, position: int) -> np.ndarray:
        if not self.first <= position < self.first + len(self.block):
            with Archive(self.path) as archive:
                block = archive.read(self.name, self.rows[position : position + BLOCK])
            self.first, self.block = position, _with_channels(block)
        return self.block[position - self.first]


def _npz_images(data: DataSettings, shape: tuple[int, ...]) -> ImageSet:
    """Only the images that are asked for are read."""
    path = Path(data.path)
    with Archive(path) as archive:
        size = archive.header(_split_array(data.split))[0][1:]
    found = (*(size[2:] or (1,)), *size[:2])
    if found != tuple(shape):
        raise DataError(f"{path} holds images of shape {found}, the prior needs {shape}")
    return npz_rows(data)


def npz_rows(data: DataSettings) -> ImageSet:
    """The images of an ``.npz`` that are asked for, of whatever size.

    Raises:
        DataError: they are not there.
    """
    path = Path(data.path)
    with Archive(path) as archive:
        array, rows = _split_rows(archive, data.split)
    chosen = select_ids(range(len(rows)), data.start_id, data.end_id)
    read, names = _Rows(path, array, [rows[i] for i in chosen]), tuple(f"{data.split}_{i:05d}" for i in chosen)

    def source(position: int) -> Source:
        return Source(names[position], arrays_sha256(read(position)))

    def labels() -> np.ndarray | None:
        with Archive(path) as archive:
            count = _num_images(archive, array)
        values = split_labels(path, array.replace("images", "labels"), count)
        return None if values is None else values[[rows[i] for i in chosen]]

    return ImageSet(tuple(chosen), names, ("data",) * len(chosen), read, source, labels)
