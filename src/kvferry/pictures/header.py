"""What a picture says of itself before a pixel is decoded: its format, its size, and whether that can be used."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, UnidentifiedImageError

from kvferry.errors import InputError

MAX_PIXELS = 89_478_485
"""Pillow's own limit for a picture that is not a decompression bomb."""
MAX_ASPECT = 200
"""How many times longer than wide a picture may be; the image processors of the Qwen-VL families take no more."""
MAX_SCANS = 64
"""Of a progressive JPEG; libjpeg's own script for colour makes 10."""

WIRE_FORMATS = ("JPEG", "PNG", "WEBP")
"""What is decoded of bytes that came over the wire."""
FILE_FORMATS = (*WIRE_FORMATS, "AVIF", "HEIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "TGA", "ICO")
"""What is read of the files of this device, HEIF where a Pillow plugin is registered. Never EPS, PostScript or WMF, for
which Pillow runs other programs or the system's own renderer."""

UNREADABLE = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, AttributeError, AssertionError,
    RuntimeError, struct.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's readers raise on damaged files."""


@dataclass(frozen=True)
class Header:
    """What :func:`check_picture` found; ``width`` and ``height`` in pixels, as they are stored.

    ``format`` is Pillow's name for it, empty for a picture in memory.
    """

    format: str
    width: int
    height: int


def check_picture(picture: Any, name: str = "") -> Header:
    """Check a picture's header: it is there, of a format that is read, and of a size that can be used.

    Parameters
    ----------
    picture : path, bytes or PIL image
        Bytes are those of a picture file. No pixel is decoded, and neither torch nor transformers is imported.
    name : str, optional
        What an error calls it, where that is not its path.

    Raises
    ------
    InputError
        No picture, or none that can be used; it says what to do.
    """
    image = picture if isinstance(picture, Image.Image) else identify(picture, name)
    called = name or (str(picture) if isinstance(picture, str | os.PathLike) else "the picture")
    check_size(image.width, image.height, called)
    return Header(image.format or "", image.width, image.height)


def identify(source: Any, name: str = "", formats: Sequence[str] = FILE_FORMATS) -> Image.Image:
    """Open a picture file, given by its path or as bytes, without decoding it.

    Raises
    ------
    InputError
        There is no such file, it is in none of ``formats``, or its size cannot be used.
    """
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        return _identify(regular(str(path)), name or str(path), formats)
    if isinstance(source, bytes | bytearray | memoryview):
        return _identify(io.BytesIO(source), name or "the picture", formats)
    raise InputError(f"a {type(source).__name__} is not a picture; pass a PIL image, a path or an array")


def check_size(width: int, height: int, name: str = "the picture") -> None:
    """Refuse a size that cannot be decoded safely, or that no model reads.

    Raises
    ------
    InputError
        Empty, more than :data:`MAX_PIXELS`, or more than :data:`MAX_ASPECT` times longer than wide.
    """
    if width < 1 or height < 1:
        raise InputError(f"{name} is empty ({width} x {height} pixels); pass one that shows something")
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{name} is too large with {width} x {height} pixels; scale it down to at most {MAX_PIXELS:,} pixels"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InputError(
            f"{name} is too narrow with {width} x {height} pixels: models read pictures up to {MAX_ASPECT} times "
            "longer than wide; cut it into pieces, or put a border around it"
        )


def check_scans(file: bytes, picture: Image.Image, name: str = "the picture") -> None:
    """Refuse a JPEG that would be gone through too often: each of a progressive file's scans goes over all its pixels.

    Parameters
    ----------
    file : bytes
        The whole file, of which ``picture`` was opened.

    Raises
    ------
    InputError
        More than :data:`MAX_SCANS` scans.
    """
    if picture.format == "JPEG" and (scans := file.count(b"\xff\xda")) > MAX_SCANS:
        raise InputError(f"{name} is a JPEG of {scans} scans; save it again (10 are usual, {MAX_SCANS} are taken)")


def _identify(file: str | io.BytesIO, name: str, formats: Sequence[str]) -> Image.Image:
    known = _known(formats)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a damaged file makes Pillow say, and bombs, which are refused below
            image = Image.open(file, formats=known)
    except Image.DecompressionBombError:
        raise InputError(f"{name} is too large; scale it down to at most {MAX_PIXELS:,} pixels") from None
    except FileNotFoundError:
        raise InputError(f"there is no picture at {name}; check the path") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{name} is not an image that can be read; convert it to PNG or JPEG (read are {', '.join(known)})"
        ) from None
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{name} cannot be read ({reason}); check the file") from None
    check_size(image.width, image.height, name)
    return image


def regular(path: str) -> str:
    """The path, if a file with an end is there: a pipe or a camera would be read for ever, or only once.

    Raises
    ------
    InputError
        There is none.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise InputError(f"there is no picture at {path}; check the path") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); check it") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise InputError(f"{path} cannot be read (it is {kind}); pass a picture file")
    return path


def _known(formats: Sequence[str]) -> tuple[str, ...]:
    """Those that this Pillow has a reader for."""
    if any(name not in Image.OPEN for name in formats):
        Image.init()
    return tuple(name for name in formats if name in Image.OPEN)
