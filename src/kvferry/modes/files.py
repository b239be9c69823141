"""Picture files on both ends: digested, sent where the cloud does not hold them, checked there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kvferry.errors import CorruptError, InputError, TruncatedError
from kvferry.modes.base import SessionStore
from kvferry.modes.checks import check_count
from kvferry.modes.digests import file_digest
from kvferry.modes.holdings import Holdings
from kvferry.pictures import MAX_PIXELS, WIRE_FORMATS, identify, open_picture
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import ProtocolError

if TYPE_CHECKING:
    from PIL import Image


class FilesOut:
    """Picture files as an edge sends them."""

    def __init__(self, files: Sequence[bytes], holdings: Holdings) -> None:
        check_count(len(files))
        self.digests = _digests(files)
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

    def __init__(self, items: Sequence[pb.AskRequest.Item], store: SessionStore, max_bytes: int) -> None:
        check_count(len(items))
        self.announced = sum(item.size for item in items if not item.handle)
        if self.announced > max_bytes:
            raise InputError(f"pictures of {self.announced} bytes are too much; at most {max_bytes} are taken")
        self._held = [store.take(item.handle, bytes) if item.handle else None for item in items]
        self._items = items
        self._store = store
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
        files, begin = list[bytes](), 0
        for item, held in zip(self._items, self._held, strict=True):
            files.append(data[begin : begin + item.size] if held is None else held)
            begin += item.size if held is None else 0
        self.digests = _digests(files)
        each = list(zip(self._items, self._held, files, self.digests, strict=True))
        if any(held is None and digest != item.digest for item, held, _, digest in each):
            raise CorruptError("a picture file is not the one its digest was made of; send it again")
        pictures = [open_picture(file, formats=WIRE_FORMATS) for file in files]
        for _, held, file, digest in each:
            if held is None:
                self._store.put(digest, file, len(file))
        return pictures


def _digests(files: Sequence[bytes]) -> list[bytes]:
    """Of picture files, by their headers and bytes, before any is decoded.

    Raises
    ------
    InputError
        A file in another format than :data:`WIRE_FORMATS`, of no usable size, or more pixels than one question takes.
    """
    opened = [identify(file, formats=WIRE_FORMATS) for file in files]
    pixels = sum(picture.width * picture.height for picture in opened)
    if pixels > MAX_PIXELS:
        raise InputError(f"pictures of {pixels:,} pixels in all are too much; at most {MAX_PIXELS:,} are taken")
    return [file_digest(file, picture) for file, picture in zip(files, opened, strict=True)]
