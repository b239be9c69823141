"""Picture files as they leave a device: upright, and without what is private in them."""

from __future__ import annotations

import io
import os
from typing import Any

from PIL import ExifTags, Image, JpegImagePlugin

from kvferry.errors import InputError
from kvferry.pictures.header import UNREADABLE, WIRE_FORMATS, identify, regular
from kvferry.pictures.read import open_picture, orientation
from kvferry.pictures.strip import stripped

JPEG_QUALITY = 90
"""Of what travels as JPEG without a quality being asked for."""


def file_of(picture: Any, quality: int = 0, *, keep_metadata: bool = False) -> bytes:
    """What travels of a picture.

    It holds no EXIF (place, time, camera), XMP, IPTC, comments, thumbnails, further pictures or bytes behind the end,
    unless they are to be kept, and a colour profile only where the colours need it. Where EXIF turns the picture, its
    pixels are turned: a PNG or WebP without loss, a JPEG with its own quantisation.

    Parameters
    ----------
    picture : path, PIL image or array
    quality : int
        JPEG quality to encode it to, 1 to 95. With 0 a JPEG, PNG or WebP file travels with the pixels it has, anything
        else as JPEG of :data:`JPEG_QUALITY`.
    keep_metadata : bool
        A file that is not encoded anew travels byte for byte; one that is keeps its EXIF.

    Raises
    ------
    InputError
        It is not a picture that can be read, or is cut off.
    """
    if not isinstance(picture, str | os.PathLike):
        return jpeg_of(picture, quality, keep_metadata=keep_metadata)
    name = os.fspath(picture)
    try:
        with open(regular(name), "rb") as file:
            data = file.read()
    except OSError as error:
        raise InputError(f"cannot read the picture {name} ({error.strerror}); check the path") from None
    image = identify(data, name)
    if quality or image.format not in (*WIRE_FORMATS, "MPO"):
        return jpeg_of(data, quality, name, keep_metadata=keep_metadata)
    if keep_metadata:
        return data
    return _as_it_is(data, image, name) or jpeg_of(data, name=name)


def jpeg_of(picture: Any, quality: int = 0, name: str = "", *, keep_metadata: bool = False) -> bytes:
    """A JPEG file of what :func:`open_picture` makes of a picture; with its EXIF if that is to be kept.

    A quality of 0 is :data:`JPEG_QUALITY`.
    """
    options: dict[str, Any] = {}
    if keep_metadata and (exif := _exif(picture, name)):
        options["exif"] = exif
    return _saved(open_picture(picture, name), "JPEG", quality=quality or JPEG_QUALITY, **options)


def _as_it_is(data: bytes, image: Image.Image, name: str) -> bytes | None:
    """The file with the same pixels and nothing private; None where it must be encoded anew."""
    if image.format == "PNG" and any(word in data for word in (b"eXIf", b"xmp", b"Raw profile")):
        try:
            image.load()  # what turns it may stand behind the pixels
        except UNREADABLE:
            return None
    if image.info.get("default_image") or (image.format == "WEBP" and getattr(image, "is_animated", False)):
        return None
    if orientation(image) == 1:
        return stripped(data, "JPEG" if image.format == "MPO" else str(image.format))
    if image.format == "PNG":
        return _saved(open_picture(data, name), "PNG")
    return None if image.format == "WEBP" else _turned(data, image, name)


def _turned(data: bytes, image: Image.Image, name: str) -> bytes | None:
    """A JPEG with its pixels turned upright, by its own tables, so that next to nothing is lost.

    Turning coefficients without decoding them would lose nothing, and is in no library that Pillow brings.
    """
    tables: dict[int, list[int]] = getattr(image, "quantization", {})
    if image.mode not in ("L", "RGB") or sorted(tables) != list(range(len(tables))):
        return None
    sideways = orientation(image) > 4
    sampling = JpegImagePlugin.get_sampling(image)
    pixels = open_picture(data, name)
    return _saved(
        pixels if image.mode == "RGB" else pixels.convert("L"),
        "JPEG",
        qtables=[_transposed(table) if sideways else table for _, table in sorted(tables.items())],
        subsampling=sampling if sampling == 2 or (sampling == 1 and not sideways) else 0,
        progressive=bool(image.info.get("progressive")),
        optimize=True,
    )


def _transposed(table: list[int]) -> list[int]:
    """A quantisation table of blocks that were turned by a quarter."""
    return [table[8 * row + column] for column in range(8) for row in range(8)]


def _exif(picture: Any, name: str) -> bytes:
    """The EXIF of a picture that will be upright; empty where there is none that can be read."""
    source = picture if isinstance(picture, Image.Image) else None
    if isinstance(picture, str | os.PathLike | bytes):
        source = identify(picture, name)
    try:
        if source is None or not (found := source.getexif()):
            return b""
        exif = Image.Exif()
        exif.load(found.tobytes())
        exif[ExifTags.Base.Orientation] = 1
        return exif.tobytes()
    except UNREADABLE:
        return b""


def _saved(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()
