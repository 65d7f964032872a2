"""Images from a folder, an ``.npz`` file or the demo set, as float tensors in [-1, 1]."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from particledaps.checkout import ROOT
from particledaps.checks import DataError
from particledaps.checksums import sha256_of
from particledaps.data.image_folder import assign_ids, image_files
from particledaps.data.image_set import ImageSet, select_ids
from particledaps.data.labels import folder_labels
from particledaps.data.npz_images import npz_images
from particledaps.data.picture_files import load_image
from particledaps.data.sources import Source

if TYPE_CHECKING:
    from particledaps.settings.schema import DataSettings

DEMO_FOLDER = ROOT / "assets" / "demo"
PHOTOGRAPHS = {"chelsea": (0.63, 0.5), "astronaut": (0.5, 0.5), "coffee": (0.5, 0.5)}
"""Of scikit-image, with the centre of the square that is cut; the cat's is the middle between its eyes."""
LARGEST_SYNTHETIC = 128
"""The synthetic cats have half this side, and are enlarged no further."""


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
        return npz_images(data, shape)
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
