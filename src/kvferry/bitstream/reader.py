"""Bytes to a cache, in whatever pieces they arrive. Nothing in a stream is trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvferry.bitstream import header as headers
from kvferry.bitstream import positions
from kvferry.bitstream.header import Header, Shape
from kvferry.bitstream.records import (
    CHECKSUM,
    FIRST_OPTIONAL_KIND,
    MAGIC,
    MAX_HEADER,
    OVERHEAD,
    PREFIX,
    VERSION,
    Kind,
    crc32c,
    decompress,
    parse,
)
from kvferry.cache import KVCache, LayerCache
from kvferry.codecs import decoder_of
from kvferry.errors import BitstreamError, CorruptError, TruncatedError, VersionError
from kvferry.wire import bitstream_pb2 as pb

MAX_CACHE = 1 << 32
_START = len(MAGIC) + 1


@dataclass(frozen=True)
class FrameSize:
    """Where the bytes of one frame went; ``overhead_bytes`` is everything but positions and payload.

    ``kept`` is per head, and the mean, rounded down, where heads keep differently many: ``counts`` then says how many
    each. ``rows`` is 1 where all heads keep the same tokens; ``form`` is how the positions are written;
    ``unpacked_bytes`` is the payload's size before the lossless stage.
    """

    layer: int
    kept: int
    rows: int
    form: str
    position_bytes: int
    payload_bytes: int
    unpacked_bytes: int
    overhead_bytes: int
    counts: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """All bytes of the frame."""
        return self.position_bytes + self.payload_bytes + self.overhead_bytes


class Reader:
    """Decodes a stream while it arrives: :meth:`feed` it chunks of any size.

    Parameters
    ----------
    device
        Where decoded layers go.
    max_bytes : int
        Refuse streams whose full cache would be larger than this in BF16. It bounds the memory that hostile bytes
        can make a reader take, to a small multiple of itself.

    Attributes
    ----------
    header : Header or None
        Known as soon as its bytes are.
    layers : dict of int to LayerCache
        What has been decoded so far.
    frames : list of FrameSize
        What has been read so far.
    complete : bool
        The trailer has come and everything fits.
    """

    def __init__(self, device: str | torch.device = "cpu", max_bytes: int = MAX_CACHE) -> None:
        self.header: Header | None = None
        self.layers: dict[int, LayerCache] = {}
        self.frames: list[FrameSize] = []
        self.complete = False
        self.header_bytes = 0
        self.total_bytes = 0
        self._device = device
        self._max_bytes = max_bytes
        self._buffer = bytearray()
        self._started = False
        self._error: BitstreamError | None = None
        self._kept: list[positions.Kept] = []
        self._unfinished: set[int] = set()
        self._checksums = bytearray()

    def feed(self, chunk: bytes) -> list[int]:
        """Take the next bytes; returns the layers that are whole now and were not before.

        Raises
        ------
        BitstreamError
            The bytes cannot be right. The reader is of no use afterwards and raises the same error again.
        """
        if self._error is not None:
            raise self._error
        before = self._whole()
        self._buffer += chunk
        self.total_bytes += len(chunk)
        try:
            consumed = self._read_records(self._read_start())
            del self._buffer[:consumed]
            if self.complete and self._buffer:
                raise CorruptError("bytes follow the end of the stream")
        except BitstreamError as error:
            self._error = error
            self._buffer.clear()
            raise
        return sorted(self._whole() - before)

    def cache(self) -> KVCache:
        """The cache; :class:`TruncatedError` while anything is missing."""
        if self._error is not None:
            raise self._error
        if not self.complete or self.header is None:
            raise TruncatedError(
                f"the stream ends after {self.total_bytes} bytes and {len(self.frames)} frames, before its trailer; "
                "have it sent again"
            )
        return KVCache(
            layers=tuple(self.layers[i] for i in range(len(self.header.shapes))),
            layout=self.header.layout,
            length=self.header.length,
            fingerprint=self.header.fingerprint,
            recipe=self.header.recipe,
            model_name=self.header.model_name,
        )

    def _whole(self) -> set[int]:
        return self.layers.keys() - self._unfinished

    def _read_start(self) -> int:
        """Check magic and version once; returns how many bytes they take in the buffer."""
        if self._started:
            return 0
        if not MAGIC.startswith(self._buffer[: len(MAGIC)]):
            raise CorruptError(f"not a kvferry bitstream: it does not start with {MAGIC.decode()}")
        if len(self._buffer) < _START:
            return 0
        version = self._buffer[len(MAGIC)]
        if version > VERSION:
            raise VersionError(f"the bitstream is of version {version}, this kvferry reads {VERSION}; update it")
        if version != VERSION:
            raise CorruptError(f"there is no bitstream version {version}")
        self._started = True
        return _START

    def _read_records(self, start: int) -> int:
        """Take every record that is entirely in the buffer from ``start`` on; returns where the next one starts."""
        while self._started and len(self._buffer) - start >= PREFIX.size:
            kind, size = PREFIX.unpack_from(self._buffer, start)
            limit = self._limit(kind)
            if size > limit:
                raise CorruptError(f"a record of kind {kind} and {size} bytes, where at most {limit} are possible")
            stop = start + PREFIX.size + size
            if len(self._buffer) < stop + CHECKSUM.size:
                break
            framed = bytes(memoryview(self._buffer)[start:stop])
            (checksum,) = CHECKSUM.unpack_from(self._buffer, stop)
            if crc32c(framed) != checksum:
                raise CorruptError(f"the checksum of a record of kind {kind} is wrong; have the stream sent again")
            start = stop + CHECKSUM.size
            self._take(kind, framed[PREFIX.size :])
            self._checksums += CHECKSUM.pack(checksum)
        return start

    def _limit(self, kind: int) -> int:
        """The largest size that a record of this kind can have."""
        if kind != Kind.FRAME or self.header is None:
            return MAX_HEADER
        return max(self._layer_limit(shape) for shape in self.header.shapes) + 1024

    def _layer_limit(self, shape: Shape) -> int:
        """Bytes that no codec needs for one layer: all tokens in float32, and their positions."""
        length = self.header.length if self.header else 0
        return length * shape.kv_heads * (4 * (shape.key_dim + shape.value_dim) + 8)

    def _take(self, kind: int, body: bytes) -> None:
        if self.complete:
            raise CorruptError("a record follows the end of the stream")
        if kind >= FIRST_OPTIONAL_KIND:
            return
        if kind not in list(Kind):
            raise VersionError(f"records of kind {kind} come from a newer version; update kvferry")
        if (self.header is None) != (kind in (Kind.HEADER, Kind.HEADER_ZSTD)):
            raise CorruptError(f"a {Kind(kind).name} record in the wrong place")
        if self.header is None:
            opened = decompress(body, MAX_HEADER) if kind == Kind.HEADER_ZSTD else body
            header = headers.decode(parse(pb.Header, opened), self._max_bytes)
            self._codec = decoder_of(header.codec, header.fingerprint)
            self.header = header
            self.header_bytes = _START + OVERHEAD + len(body)
        elif kind == Kind.FRAME:
            self._take_frame(self.header, body)
        else:
            self._take_trailer(self.header, parse(pb.Trailer, body))

    def _take_frame(self, header: Header, body: bytes) -> None:
        message = parse(pb.Frame, body)
        layer, payload = message.layer, message.payload
        if layer >= len(header.shapes) or layer in self._whole():
            raise CorruptError(f"a frame for layer {layer}, which does not exist or was whole already")
        shape = header.shapes[layer]
        kept = positions.decode(message.positions, header.length, shape.kv_heads, self._kept)
        if message.zstd:
            payload = decompress(payload, self._layer_limit(shape))
        rows = 1 if kept.counts else shape.kv_heads
        index = torch.from_numpy(kept.rows).expand(rows, -1).contiguous()
        keys, values = self._codec.decode(
            layer,
            payload,
            (*index.shape, shape.key_dim),
            (*index.shape, shape.value_dim),
            index,
            header.layout,
        )
        device = self._device
        tokens = LayerCache(keys.to(device), values.to(device), index.to(device), kept.counts)
        self.layers[layer] = _merge(self.layers[layer], tokens) if layer in self.layers else tokens
        (self._unfinished.add if message.more else self._unfinished.discard)(layer)
        self._kept.append(kept)
        where, encoded = message.positions.ByteSize(), len(message.payload)
        self.frames.append(
            FrameSize(
                layer=layer,
                kept=tokens.kept,
                rows=kept.heads,
                form=message.positions.WhichOneof("form") or "",
                position_bytes=where,
                payload_bytes=encoded,
                unpacked_bytes=len(payload),
                overhead_bytes=OVERHEAD + len(body) - where - encoded,
                counts=kept.counts,
            )
        )

    def _take_trailer(self, header: Header, message: pb.Trailer) -> None:
        if message.frames != len(self.frames) or message.digest != crc32c(bytes(self._checksums)):
            raise CorruptError("the frames are not those that were written; have the stream sent again")
        missing = set(range(len(header.shapes))) - self._whole()
        if missing:
            raise CorruptError(f"the stream ends without layers {sorted(missing)}")
        self.complete = True


def _merge(have: LayerCache, come: LayerCache) -> LayerCache:
    """Both in ascending order of position; :class:`CorruptError` where they share one."""
    heads = []
    for pair in zip(have.split(), come.split(), strict=True):
        tensors = zip(*((x.keys, x.values, x.positions) for x in pair), strict=True)
        keys, values, where = (torch.cat(same, 1) for same in tensors)
        both = LayerCache(keys, values, where)
        heads.append(both.take(both.positions.argsort(dim=1)))
        if bool((heads[-1].positions.diff() == 0).any()):
            raise CorruptError("two frames hold the same token")
    return LayerCache.join(heads)


def decompress_stream(blob: bytes, device: str | torch.device = "cpu") -> KVCache:
    """The cache in ``blob``, a whole stream."""
    reader = Reader(device)
    reader.feed(blob)
    return reader.cache()
