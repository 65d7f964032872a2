"""The orientation that a camera writes into a picture, read alone: whatever else stands in its EXIF may be damaged.

Pillow's own ``exif_transpose`` writes the whole EXIF anew, which fails where one entry cannot be written back.
"""

from __future__ import annotations

from PIL import Image

ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the picture upright (EXIF 2.32, tag 0x0112); 1 is upright already."""


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where none can be read. A TIFF must not be loaded yet, loading turns it.

    Raises:
        OSError, ValueError, SyntaxError: the pixels of another format are damaged (its EXIF may follow them).
    """
    if image.format != "TIFF":
        image.load()
    try:
        found = image.getexif().get(ORIENTATION, 1)
        return int(found) if found in TURNS else 1
    except Exception:  # damaged EXIF can raise anything, and it is not what the picture is wanted for
        return 1


def upright(image: Image.Image) -> Image.Image:
    """The picture as it is shown, all of its EXIF but the orientation ignored.

    Raises:
        OSError, ValueError, SyntaxError: the pixels are damaged.
    """
    image.load()
    turn = TURNS.get(read_orientation(image))
    return image if turn is None else image.transpose(turn)
