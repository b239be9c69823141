"""Any picture to the pixels that a viewer shows: upright, opaque, 8-bit sRGB."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from kvferry.errors import InputError
from kvferry.pictures.arrays import from_array
from kvferry.pictures.colour import shown
from kvferry.pictures.header import FILE_FORMATS, UNREADABLE, check_size, identify

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its orientation in EXIF or XMP."""


def open_picture(picture: Any, name: str = "", *, formats: Sequence[str] = FILE_FORMATS) -> Image.Image:
    """A picture as a viewer shows it: upright, 8 bits a channel, sRGB, transparency on white, the first frame.

    Every path into the library reads pictures here. The result is decoded, of mode RGB, and carries no metadata.

    Parameters
    ----------
    picture : PIL image, path, bytes of a picture file, or array
        A PIL image is turned upright by the EXIF that it carries; where it has several frames, the one it is at is
        taken. Arrays: :func:`kvferry.pictures.arrays.from_array`.
    name : str, optional
        What an error calls it, where that is not its path.
    formats : sequence of str
        What a file may be; :data:`WIRE_FORMATS` where it came from somebody else.

    Raises
    ------
    InputError
        Not a picture, cut off, of a size that cannot be used, or of a kind whose looks are not defined.
    """
    if not name:
        name = os.fspath(picture) if isinstance(picture, str | os.PathLike) else "the picture"
    if isinstance(picture, Image.Image):
        image = picture
    elif isinstance(picture, str | os.PathLike | bytes | bytearray | memoryview):
        image = first_frame(identify(picture, name, formats), name)
    elif isinstance(picture, np.ndarray) or hasattr(picture, "__array__"):
        image = from_array(picture)
    else:
        raise InputError(f"a {type(picture).__name__} is not a picture; pass a PIL image, a path or an array")
    check_size(image.width, image.height, name)
    pixels = shown(image, name)
    turn = _TURNS.get(orientation(image))
    return pixels if turn is None else pixels.transpose(turn)


def first_frame(image: Image.Image, name: str = "the picture") -> Image.Image:
    """The same file where a viewer begins: an animated PNG may have a picture before its first frame."""
    if image.info.get("default_image"):
        try:
            image.seek(1)
        except UNREADABLE:
            raise InputError(f"{name} cannot be decoded; it may be cut off, pass an intact image file") from None
    return image


def orientation(image: Image.Image) -> int:
    """1 to 8, as EXIF counts; 1 is upright, and so is a picture whose EXIF cannot be read.

    A picture file is decoded first: a PNG may say it behind its pixels, and Pillow turns a TIFF by itself.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever a damaged block makes Pillow raise: a viewer shows the picture all the same
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1
