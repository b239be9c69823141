"""Bytes to a cache, in whatever pieces they arrive. Nothing in a stream is trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvferry.bitstream import layout as layouts
from kvferry.bitstream import positions
from kvferry.bitstream.records import (
    CHECKSUM,
    FIRST_OPTIONAL_KIND,
    MAGIC,
    MAX_HEADER,
    PREFIX,
    VERSION,
    Kind,
    crc32c,
    decompress,
    parse,
)
from kvferry.bitstream.writer import join_planes
from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs import Codec, parse_codec
from kvferry.errors import BitstreamError, CorruptError, RecipeError, TruncatedError, VersionError
from kvferry.wire.bitstream_pb2 import Frame, Trailer
from kvferry.wire.bitstream_pb2 import Header as HeaderMessage

MAX_CACHE = 1 << 32
MAX_LAYERS = 4096
MAX_DIM = 1 << 16


@dataclass(frozen=True)
class Header:
    """What a stream says about its cache before the first frame.

    ``shapes`` has (kv_heads, key_dim, value_dim) per layer; the rest is as in :class:`kvferry.cache.KVCache`.
    """

    fingerprint: str
    model_name: str
    recipe: str
    length: int
    layout: PromptLayout
    shapes: tuple[tuple[int, int, int], ...]

    @property
    def full_bf16_bytes(self) -> int:
        """Size of the whole prompt's cache in BF16."""
        return len(self.layout) * sum(2 * heads * (key + value) for heads, key, value in self.shapes)


@dataclass(frozen=True)
class FrameSize:
    """Where the bytes of one frame went; ``overhead`` is everything but positions and payload."""

    layer: int
    kept: int
    rows: int
    form: str
    position_bytes: int
    payload_bytes: int
    unpacked_bytes: int
    overhead_bytes: int

    @property
    def total(self) -> int:
        """All bytes of the record."""
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
        self._error: BitstreamError | None = None
        self._codec: Codec | None = None
        self._rows: list[positions.Rows] = []
        self._open: set[int] = set()
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
        whole = self._whole()
        self._buffer += chunk
        self.total_bytes += len(chunk)
        try:
            self._advance()
        except BitstreamError as error:
            self._error = error
            self._buffer.clear()
            raise
        return sorted(self._whole() - whole)

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
        return self.layers.keys() - self._open

    def _advance(self) -> None:
        """Consume every record that is entirely in the buffer."""
        start = 0
        if self.total_bytes == len(self._buffer):  # nothing consumed yet
            if not MAGIC.startswith(self._buffer[: len(MAGIC)]):
                raise CorruptError("not a kvferry bitstream (it does not start with 'KVF')")
            start = len(MAGIC) + 1
            if len(self._buffer) < start:
                return
            version = self._buffer[len(MAGIC)]
            if version > VERSION:
                raise VersionError(f"the bitstream is of version {version}, this kvferry reads {VERSION}; update it")
            if version != VERSION:
                raise CorruptError(f"there is no bitstream version {version}")
        while len(self._buffer) - start >= PREFIX.size:
            kind, size = PREFIX.unpack_from(self._buffer, start)
            if size > self._limit(kind):
                raise CorruptError(f"a record of kind {kind} and {size} bytes, where {self._limit(kind)} are possible")
            stop = start + PREFIX.size + size
            if len(self._buffer) < stop + CHECKSUM.size:
                break
            framed = bytes(memoryview(self._buffer)[start:stop])
            (checksum,) = CHECKSUM.unpack_from(self._buffer, stop)
            if crc32c(framed) != checksum:
                raise CorruptError(f"the checksum of a record of kind {kind} is wrong; have it sent again")
            start = stop + CHECKSUM.size
            self._take(kind, framed[PREFIX.size :])
            self._checksums += CHECKSUM.pack(checksum)
        if self.header is not None or start > len(MAGIC) + 1:
            del self._buffer[:start]
        if self.complete and self._buffer:
            raise CorruptError("bytes follow the end of the stream")

    def _limit(self, kind: int) -> int:
        """The largest size that a record of this kind can have."""
        if kind != Kind.FRAME:
            return MAX_HEADER
        if self.header is None:
            return 0
        return max(map(self._layer_limit, self.header.shapes)) + 1024

    def _layer_limit(self, shape: tuple[int, int, int]) -> int:
        """Bytes of one layer that no sane codec exceeds: all tokens in float32, and their positions."""
        assert self.header is not None
        heads, key, value = shape
        return self.header.length * heads * (4 * (key + value) + 8)

    def _take(self, kind: int, body: bytes) -> None:
        if self.complete:
            raise CorruptError("a record follows the end of the stream")
        if kind >= FIRST_OPTIONAL_KIND:
            return
        if kind in (Kind.HEADER, Kind.HEADER_ZSTD) and self.header is None:
            self._take_header(decompress(body, MAX_HEADER) if kind == Kind.HEADER_ZSTD else body)
            self.header_bytes = len(MAGIC) + 1 + PREFIX.size + len(body) + CHECKSUM.size
        elif kind == Kind.FRAME:
            self._take_frame(body)
        elif kind == Kind.TRAILER and self.header is not None:
            self._take_trailer(body)
        elif kind in list(Kind):
            raise CorruptError(f"a {Kind(kind).name} record in the wrong place")
        else:
            raise VersionError(f"records of kind {kind} come from a newer version; update kvferry")

    def _take_header(self, body: bytes) -> None:
        message = parse(HeaderMessage, body)
        shapes = []
        for shape in message.layers:
            if not 0 < shape.repeat <= MAX_LAYERS - len(shapes):
                raise CorruptError(f"more layers than {MAX_LAYERS}, or none")
            if not all(0 < x <= MAX_DIM for x in (shape.kv_heads, shape.key_dim, shape.value_dim)):
                raise CorruptError(f"layers of {shape.kv_heads} x {shape.key_dim}, {shape.value_dim} numbers a token")
            shapes += [(shape.kv_heads, shape.key_dim, shape.value_dim)] * shape.repeat
        layout = layouts.decode(message.layout)
        if not shapes or not 0 < message.length <= len(layout):
            raise CorruptError(f"{len(shapes)} layers for {message.length} of {len(layout)} tokens")
        header = Header(
            message.fingerprint, message.model_name, message.recipe, message.length, layout, tuple(shapes)
        )
        if header.full_bf16_bytes > self._max_bytes:
            raise CorruptError(
                f"the full cache would be {header.full_bf16_bytes} bytes; this reader takes {self._max_bytes} "
                "(raise max_bytes if that is right)"
            )
        try:
            self._codec = parse_codec(message.recipe.split("|")[1].strip())
        except (IndexError, RecipeError) as error:
            raise VersionError(f"cannot decode the recipe {message.recipe!r} ({error}); update kvferry") from None
        self.header = header

    def _take_frame(self, body: bytes) -> None:
        message = parse(Frame, body)
        assert self.header is not None
        assert self._codec is not None
        layer = message.layer
        if layer >= len(self.header.shapes) or (layer in self.layers and layer not in self._open):
            raise CorruptError(f"a frame for layer {layer}, which is not there or was already whole")
        heads, key, value = shape = self.header.shapes[layer]
        rows = positions.decode(message.positions, self.header.length, heads, self._rows)
        payload = message.payload
        if message.zstd:
            payload = join_planes(decompress(payload, self._layer_limit(shape)), message.planes)
        kept = rows.shape[1]
        index = torch.from_numpy(rows).expand(heads, -1).contiguous()
        keys, values = self._codec.decode(
            layer, payload, (heads, kept, key), (heads, kept, value), index, self.header.layout
        )
        tokens = LayerCache(keys.to(self._device), values.to(self._device), index.to(self._device))
        self.layers[layer] = _merge(self.layers[layer], tokens) if layer in self.layers else tokens
        (self._open.add if message.more else self._open.discard)(layer)
        self._rows.append(rows)
        where = message.positions.ByteSize()
        self.frames.append(
            FrameSize(
                layer=layer,
                kept=kept,
                rows=len(rows),
                form=message.positions.WhichOneof("form"),
                position_bytes=where,
                payload_bytes=len(message.payload),
                unpacked_bytes=len(payload),
                overhead_bytes=PREFIX.size + len(body) + CHECKSUM.size - where - len(message.payload),
            )
        )

    def _take_trailer(self, body: bytes) -> None:
        message = parse(Trailer, body)
        assert self.header is not None
        if message.frames != len(self.frames) or message.digest != crc32c(bytes(self._checksums)):
            raise CorruptError("the frames are not those that were written")
        missing = set(range(len(self.header.shapes))) - self._whole()
        if missing:
            raise CorruptError(f"the stream ends without layers {sorted(missing)}")
        self.complete = True


def _merge(have: LayerCache, come: LayerCache) -> LayerCache:
    """Both in ascending order of position; :class:`CorruptError` where they share one."""
    both = LayerCache(
        torch.cat([have.keys, come.keys], 1),
        torch.cat([have.values, come.values], 1),
        torch.cat([have.positions, come.positions], 1),
    )
    merged = both.take(both.positions.argsort(dim=1))
    if bool((merged.positions[:, 1:] == merged.positions[:, :-1]).any()):
        raise CorruptError("two frames hold the same token")
    return merged


def decompress_stream(blob: bytes, device: str | torch.device = "cpu") -> KVCache:
    """The cache in ``blob``, a whole stream."""
    reader = Reader(device)
    reader.feed(blob)
    return reader.cache()
