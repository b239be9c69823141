"""Picture files on both ends: digested, sent where the cloud does not hold them, checked there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from kvferry.errors import CorruptError, InputError, TruncatedError
from kvferry.modes.base import SessionStore
from kvferry.modes.checks import check_count
from kvferry.modes.digests import file_digest
from kvferry.modes.holdings import Holdings
from kvferry.pictures import MAX_PIXELS, WIRE_FORMATS, identify
from kvferry.pictures.apart import Reduce
from kvferry.pictures.header import check_scans
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import ProtocolError

if TYPE_CHECKING:
    from PIL import Image

FILE_COPIES = 2
"""Of a file that are in memory at once: as it arrives, and for itself."""
PIXEL_BYTES = 6
"""Of a decoded pixel, in the size that the model reads, and of its copy for the model's processor."""
TOKEN_BYTES = 1 << 16
"""Of a visual token: its patches as the processor cuts them, and on their way through the vision tower."""
DECODING_BYTES, WIDE_BYTES = 18, 26
"""Of a pixel while its file is decoded: as coefficients, as it is stored and as it comes out; more with opacity, in 16
bits, in four inks, or as WebP, which keeps two canvases."""


class FilesOut:
    """Picture files as an edge sends them."""

    def __init__(self, files: Sequence[bytes], holdings: Holdings) -> None:
        check_count(len(files))
        opened = identified(files)
        self.digests = [file_digest(file, picture) for file, picture in zip(files, opened, strict=True)]
        self._sizes = [(picture.width, picture.height) for picture in opened]
        self._files = files
        self._holdings = holdings
        self._items: list[pb.AskRequest.Item] = []

    def items(self) -> list[pb.AskRequest.Item]:
        """Of all files, by what is known to be held at this moment."""
        each = zip(self.digests, self._files, self._sizes, strict=True)
        self._items = [self._holdings.item(digest, len(file), size) for digest, file, size in each]
        return self._items

    def __iter__(self) -> Iterator[bytes]:
        """The files that :meth:`items` said would follow."""
        return (file for item, file in zip(self._items, self._files, strict=True) if not item.handle)


class FilesIn:
    """Picture files as a cloud takes them in: from the session, and from the first bytes of the request.

    Sizes are announced, and bounded, before the first byte.

    Parameters
    ----------
    visual_tokens : callable
        How many tokens the model makes of pictures of these widths and heights; see
        :meth:`kvferry.models.prompt.Prompter.visual_tokens`.
    reduce : callable
        What the model scales a picture to; see :class:`kvferry.models.reduced.Reducer`.

    Attributes
    ----------
    sizes : list of (int, int)
        Widths and heights of the pictures as they are stored, once their headers are there.
    tokens : int
        That the model reads of them, as far as is known: announced, and then seen.
    """

    def __init__(
        self,
        items: Sequence[pb.AskRequest.Item],
        store: SessionStore,
        max_bytes: int,
        visual_tokens: Callable[[Iterable[tuple[int, int]]], int],
        reduce: Reduce,
    ) -> None:
        self._visual_tokens, self._reduce = visual_tokens, reduce
        self.sizes: list[tuple[int, int]] = []
        check_count(len(items))
        self.announced = sum(item.size for item in items if not item.handle)
        if self.announced > max_bytes:
            raise InputError(f"pictures of {self.announced} bytes are too much; at most {max_bytes} are taken")
        told = [(item.width, item.height) for item in items if not item.handle and item.width and item.height]
        if sum(width * height for width, height in told) > MAX_PIXELS:
            raise InputError(f"pictures of more than {MAX_PIXELS:,} pixels in all are too much; scale them down")
        self.tokens = visual_tokens(told)
        store.reserve(FILE_COPIES * self.announced)
        self._held = [store.take(item.handle, bytes) if item.handle else None for item in items]
        self._items = items
        self._store = store
        self._data = bytearray()
        self._files: list[bytes] = []
        self.digests: list[bytes] = []
        if not self.announced and items:
            self._look()

    def feed(self, data: bytes) -> None:
        """Take the next bytes. With the last of them all headers are looked at, and memory is reserved for the pixels.

        Raises
        ------
        ProtocolError, CorruptError, InputError, BusyError
            More bytes than announced, other bytes, no pictures, or more of them than one question may bring.
        """
        if len(self._data) + len(data) > self.announced:
            raise ProtocolError("more picture bytes than were announced")
        self._data += data
        if data and len(self._data) == self.announced:
            self._look()

    def open(self) -> list[Image.Image]:
        """All pictures, decoded one after the other, large ones in the size that the model reads; nothing is kept of
        their files but what the session holds.

        Raises
        ------
        TruncatedError, InputError
            Too few bytes, or what cannot be decoded.
        """
        if len(self._data) < self.announced:
            raise TruncatedError(f"{len(self._data)} of {self.announced} picture bytes arrived; send them again")
        pictures = []
        for file in self._files:
            self._store.reserve(0)
            pictures.append(self._store.open_picture(file, self._reduce))
        for held, file, digest in zip(self._held, self._files, self.digests, strict=True):
            if held is None:
                self._store.put(digest, file, len(file))
        self._files.clear()
        self._data.clear()
        return pictures

    def _look(self) -> None:
        files, begin = list[bytes](), 0
        for item, held in zip(self._items, self._held, strict=True):
            files.append(bytes(self._data[begin : begin + item.size]) if held is None else held)
            begin += item.size if held is None else 0
        opened = identified(files)
        self._store.reserve(memory_of(opened, self._visual_tokens, self._reduce))
        self.sizes = [(picture.width, picture.height) for picture in opened]
        for item, size in zip(self._items, self.sizes, strict=True):
            if not item.handle and (item.width or item.height) and (item.width, item.height) != size:
                raise ProtocolError("a picture has another size than was announced; update the edge")
        self.tokens = self._visual_tokens(self.sizes)
        self.digests = [file_digest(file, picture) for file, picture in zip(files, opened, strict=True)]
        each = zip(self._items, self._held, self.digests, strict=True)
        if any(held is None and digest != item.digest for item, held, digest in each):
            raise CorruptError("a picture file is not the one its digest was made of; send it again")
        self._files = files


def identified(files: Sequence[bytes]) -> list[Image.Image]:
    """Picture files opened, of which no pixel is decoded.

    Raises
    ------
    InputError
        A file in another format than :data:`WIRE_FORMATS`, of no usable size, or more pixels than one question takes.
    """
    opened = [identify(file, formats=WIRE_FORMATS) for file in files]
    pixels = sum(picture.width * picture.height for picture in opened)
    if pixels > MAX_PIXELS:
        raise InputError(f"pictures of {pixels:,} pixels in all are too much; at most {MAX_PIXELS:,} are taken")
    for file, picture in zip(files, opened, strict=True):
        check_scans(file, picture)
    return opened


def memory_of(
    opened: Sequence[Image.Image], visual_tokens: Callable[[Iterable[tuple[int, int]]], int], reduce: Reduce
) -> int:
    """Bytes that decoding these pictures takes, one after the other, and reading them with the model's processor."""
    sizes = [(picture.width, picture.height) for picture in opened]
    read = sum(width * height for width, height, *_ in (reduce(*size) or size for size in sizes))
    decoding = max(map(decoding_bytes, opened), default=0)
    return PIXEL_BYTES * read + decoding + TOKEN_BYTES * visual_tokens(sizes)


def decoding_bytes(picture: Image.Image) -> int:
    """Of memory that a picture takes while its file is decoded; of the file only the header was read."""
    plain = picture.mode in ("1", "L", "P", "RGB") and picture.format != "WEBP" and "transparency" not in picture.info
    return picture.width * picture.height * (DECODING_BYTES if plain else WIDE_BYTES)
