"""Files of measurements: ``.npz`` and ``.npy`` are opened; of other formats it is said how to make an ``.npz`` of them.

What a file is, its content says first and its name second. Nothing is opened here that could run code.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from particledaps.checks import DataError
from particledaps.data.npz import DAMAGED, Archive, SingleArray

HEAD = 32


class Format(NamedTuple):
    """How a format becomes an array.

    Attributes:
        name: of the format, with its article.
        imports: what Python needs beside NumPy.
        array: the array, with ``{file}`` and ``{shape}`` to fill in.
    """

    name: str
    imports: str
    array: str


HDF5 = Format("an HDF5 file", "import h5py", "h5py.File({file})['NAME'][()]")
MATLAB = Format("a MATLAB file", "import scipy.io", "scipy.io.loadmat({file})['NAME']")
MATLAB_73 = Format("a MATLAB file of version 7.3", "import h5py", "h5py.File({file})['NAME'][()].T")
TIFF = Format("a TIFF file", "import tifffile", "tifffile.imread({file})")
PICTURE = Format(
    "a picture",
    "from PIL import Image",
    "np.atleast_3d(np.asarray(Image.open({file}), 'float32')).transpose(2, 0, 1)",
)
COMMAS = Format("a table", "", "np.loadtxt({file}, delimiter=',').reshape({shape})")
TEXT = Format("text", "", "np.loadtxt({file}).reshape({shape})")
TORCH = Format("a file of torch", "import torch", "torch.load({file}, map_location='cpu', weights_only=True).numpy()")
SAFETENSORS = Format("a safetensors file", "from safetensors.numpy import load_file", "load_file({file})['NAME']")
FITS = Format("a FITS file", "from astropy.io import fits", "fits.getdata({file})")
MRC = Format("an MRC file", "import mrcfile", "mrcfile.read({file})")
PICKLE = Format("a pickle, which can run any code when it is opened", "", "")
FORMATS = {
    ".mat": MATLAB,
    **dict.fromkeys((".h5", ".hdf5", ".hdf", ".he5", ".cxi", ".nxs"), HDF5),
    **dict.fromkeys((".tif", ".tiff"), TIFF),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".pgm", ".ppm"), PICTURE),
    ".csv": COMMAS,
    **dict.fromkeys((".txt", ".tsv", ".dat", ".asc"), TEXT),
    **dict.fromkeys((".pt", ".pth"), TORCH),
    ".safetensors": SAFETENSORS,
    **dict.fromkeys((".fits", ".fit", ".fts"), FITS),
    **dict.fromkeys((".mrc", ".mrcs"), MRC),
    **dict.fromkeys((".pkl", ".pickle", ".joblib"), PICKLE),
}
BEGINNINGS = {
    b"MATLAB 7.3 MAT-file": MATLAB_73,
    b"MATLAB 5.0 MAT-file": MATLAB,
    b"\x89HDF\r\n\x1a\n": HDF5,
    b"II*\0": TIFF,
    b"MM\0*": TIFF,
    b"\x89PNG\r\n\x1a\n": PICTURE,
    b"\xff\xd8\xff": PICTURE,
    b"SIMPLE  =": FITS,
}


def open_arrays(path: Path, shape: tuple[int, ...]) -> Archive:
    """An ``.npz``, or an ``.npy`` as an archive of ``y`` alone.

    Args:
        path: the file.
        shape: of one measurement, for advice.

    Raises:
        DataError: it does not exist, is damaged, or is of another format; then with the Python that converts it.
    """
    suffix = path.suffix.lower()
    if suffix == ".npz" or not path.is_file() or _is_npz(path):
        return Archive(path)
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if head.startswith(np.lib.format.MAGIC_PREFIX):
        return SingleArray(path)
    known = next((f for start, f in BEGINNINGS.items() if head.startswith(start)), FORMATS.get(suffix))
    raise DataError(f"{path} {_advice(path, known, shape)}")


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".npy") for name in archive.namelist())
    except DAMAGED:
        return False


def _advice(path: Path, known: Format | None, shape: tuple[int, ...]) -> str:
    wanted = f"y of the shape {('N', *shape)} or {shape}".replace("'", "")
    if known is None or known is PICKLE:
        what = "is not a readable .npy or .npz file" if known is None else f"is {known.name}, and is not read"
        return f"{what}; in the program that made it, import numpy as np; np.savez('y.npz', y=ARRAY), {wanted}"
    imports = "; ".join(filter(None, ("import numpy as np", known.imports)))
    array = known.array.format(file=repr(str(path)), shape=(-1, *shape))
    return f"is {known.name}, not .npz or .npy; to convert it: {imports}; np.savez('y.npz', y={array}), {wanted}"
