"""Picture files on both ends: read, re-encoded, digested, sent where the cloud does not hold them, checked there."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

from PIL import Image

from kvferry.errors import CorruptError, InputError, TruncatedError
from kvferry.modes.base import Shelf, check_count
from kvferry.modes.digests import file_digest
from kvferry.modes.holdings import Holdings
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import ProtocolError

JPEG_QUALITY = 90
FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 64 * 1024 * 1024


class FilesOut:
    """Picture files as an edge sends them."""

    def __init__(self, files: Sequence[bytes], holdings: Holdings) -> None:
        check_count(len(files))
        self.digests = [file_digest(file, identify(file)) for file in files]
        self._files = files
        self._holdings = holdings
        self._items: list[pb.AskRequest.Item] = []

    def items(self) -> list[pb.AskRequest.Item]:
        """Of all files, by what is known to be held at this moment."""
        each = zip(self.digests, self._files, strict=True)
        self._items = [self._holdings.item(digest, len(file)) for digest, file in each]
        return self._items

    def __iter__(self) -> Iterator[bytes]:
        """The files that :meth:`items` said would follow."""
        return (file for item, file in zip(self._items, self._files, strict=True) if not item.handle)


class FilesIn:
    """Picture files as a cloud takes them in: from the session, and from the first bytes of the request.

    Sizes are announced, and bounded, before the first byte.
    """

    def __init__(self, items: Sequence[pb.AskRequest.Item], shelf: Shelf, max_bytes: int) -> None:
        check_count(len(items))
        self.announced = sum(item.size for item in items if not item.handle)
        if self.announced > max_bytes:
            raise InputError(f"pictures of {self.announced} bytes are too much; at most {max_bytes} are taken")
        self._held = [shelf.take(item.handle, bytes) if item.handle else None for item in items]
        self._items = items
        self._shelf = shelf
        self.digests: list[bytes] = []

    def check_size(self, nbytes: int) -> None:
        """Refuse more bytes than were announced."""
        if nbytes > self.announced:
            raise ProtocolError("more picture bytes than were announced")

    def open(self, data: bytes) -> list[Image.Image]:
        """All pictures; ``data`` is what followed of them.

        Raises
        ------
        TruncatedError, ProtocolError, CorruptError, InputError
            Too few bytes, too many, other bytes than announced, or no picture.
        """
        if len(data) < self.announced:
            raise TruncatedError(f"{len(data)} of {self.announced} picture bytes arrived; send them again")
        self.check_size(len(data))
        pictures, begin = [], 0
        for item, held in zip(self._items, self._held, strict=True):
            if held is not None:
                file = held
            else:
                file = data[begin : begin + item.size]
                begin += item.size
            digest = file_digest(file, identify(file))
            if held is None and digest != item.digest:
                raise CorruptError("a picture file is not the one its digest was made of; send it again")
            pictures.append(open_picture(file))
            self.digests.append(digest)
            if held is None:
                self._shelf.put(digest, file, len(file))
        return pictures


def file_bytes(image: Image.Image | str | PathLike[str], quality: int = 0) -> bytes:
    """What travels of a picture.

    Parameters
    ----------
    quality : int
        JPEG quality to encode it to, 1 to 95. With 0 a JPEG or PNG file travels as it is, anything else as JPEG of
        quality 90.

    Raises
    ------
    InputError
        If it is not a picture, or there is none.
    """
    if isinstance(image, Image.Image):
        return as_jpeg(image, quality or JPEG_QUALITY)
    if not isinstance(image, str | PathLike):
        raise InputError(f"a {type(image).__name__} is not a picture; pass a path or a PIL image")
    try:
        data = Path(image).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the picture {image} ({error.strerror}); check the path") from None
    picture = identify(data, str(image))
    if not quality and picture.format in FORMATS:
        return data
    return as_jpeg(open_picture(data, str(image)), quality or JPEG_QUALITY)


def open_picture(data: bytes, name: str = "the picture") -> Image.Image:
    """Decode a picture file, refusing what is not one and what would unfold to too many pixels."""
    picture = identify(data, name)
    try:
        picture.load()
    except (OSError, SyntaxError, ValueError):
        raise InputError(f"{name} cannot be decoded; it may be cut off, send a whole JPEG or PNG file") from None
    return picture


def identify(data: bytes, name: str = "the picture") -> Image.Image:
    """Read a picture's format and size, no pixel yet."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        raise InputError(f"{name} is not a picture that can be read; send a JPEG or PNG file") from None
    if picture.width * picture.height > MAX_PIXELS:
        raise InputError(f"{name} has {picture.width} x {picture.height} pixels; make it smaller")
    return picture


def as_jpeg(image: Image.Image, quality: int) -> bytes:
    """A JPEG file of ``image``."""
    out = io.BytesIO()
    image.convert("RGB").save(out, "JPEG", quality=quality)
    return out.getvalue()
