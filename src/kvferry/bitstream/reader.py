"""Bytes to a cache, in whatever pieces they arrive. Nothing in a stream is trusted."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from kvferry.bitstream import header as headers
from kvferry.bitstream.bounds import MAX_CACHE, MAX_HEADER, Bounds, Reserve, no_reserve
from kvferry.bitstream.frame_size import FrameSize, size_of
from kvferry.bitstream.header import Header, Shape
from kvferry.bitstream.positions import Kept, Places
from kvferry.bitstream.records import (
    CHECKSUM,
    FIRST_OPTIONAL_KIND,
    MAGIC,
    START,
    VERSION,
    Chain,
    Kind,
    decompress,
    parse,
    read_prefix,
)
from kvferry.bitstream.varints import Numbers
from kvferry.cache import KVCache, LayerCache
from kvferry.codecs import Codec, JointCoder, decoder_of
from kvferry.codecs.checks import check_numbers
from kvferry.errors import BitstreamError, CorruptError, InputError, TruncatedError, VersionError
from kvferry.lazy import torch
from kvferry.wire import bitstream_pb2 as pb

MAX_SMALL = 1 << 12
"""Bytes that a trailer, or what a codec adds to its numbers, may take."""
_LAYOUT_BYTES = 64
"""Of memory that a prompt's token takes."""


class Partial(NamedTuple):
    """What has arrived of a stream: a cache that can be resumed, and how much of the whole one it is.

    ``share`` is that of the tokens kept in all heads of all layers, ``bytes`` what was read for it.
    """

    cache: KVCache
    share: float
    bytes: int


class Reader:
    """Decodes a stream while it arrives: :meth:`feed` it chunks of any size.

    Parameters
    ----------
    device
        Where decoded layers go.
    max_bytes : int
        Refuse streams whose full cache would be larger than this in BF16. It bounds the memory that hostile bytes
        can make a reader take, to a small multiple of itself.
    layers : collection of int, optional
        Keep these layers only. The payloads of others are not decoded, unless the codec remembers something from
        frame to frame. There is no :meth:`cache` then, only :attr:`layers`.
    bounds : Bounds, optional
        Instead of ``max_bytes``: all that a stream may announce.
    reserve : callable
        Told how many bytes are about to be taken for what is decoded, before they are.
    decode : bool
        False: checksums and positions are checked, but keys and values are not decoded, for which neither PyTorch nor
        a profile is needed. There are no :attr:`layers` then; :meth:`positions` says what is kept.

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

    def __init__(
        self,
        device: str | torch.device = "cpu",
        max_bytes: int = MAX_CACHE,
        layers: Collection[int] | None = None,
        bounds: Bounds | None = None,
        reserve: Reserve = no_reserve,
        decode: bool = True,
    ) -> None:
        self.header: Header | None = None
        self.layers: dict[int, LayerCache] = {}
        self.frames: list[FrameSize] = []
        self.complete = False
        self.header_bytes = 0
        self.total_bytes = 0
        self._device = device
        self._bounds = bounds or Bounds(max_bytes)
        self._reserve = reserve
        self._wanted = None if layers is None and decode else frozenset(layers or ())
        self._decodes = decode
        self._buffer = bytearray()
        self._started = False
        self._error: BitstreamError | None = None
        self._chain = Chain()
        self._next = 0
        self._come: dict[int, int] = {}
        self._whole: set[int] = set()

    def feed(self, chunk: bytes) -> list[int]:
        """Take the next bytes; returns the layers that are whole now and were not before.

        Raises
        ------
        BitstreamError
            The bytes cannot be right. The reader is of no use afterwards and raises the same error again.
        """
        if self._error is not None:
            raise self._error
        before = set(self._whole)
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
        return sorted(self._whole - before)

    def cache(self) -> KVCache:
        """The cache; :class:`TruncatedError` while anything is missing."""
        if self._error is not None:
            raise self._error
        if not self.complete or self.header is None:
            raise TruncatedError(
                f"the stream ends after {self.total_bytes} bytes and {len(self.frames)} frames, before its trailer; "
                "have it sent again"
            )
        return self._cache(self.header)

    def partial(self) -> Partial:
        """What the frames so far hold, whether or not more will come.

        Raises
        ------
        TruncatedError
            Some layer has no frame yet. A stream written in tiers gets over that soon, others only at their end.
        """
        if self._error is not None:
            raise self._error
        if self.header is None:
            raise TruncatedError(f"{self.total_bytes} bytes have come, but no header yet; wait for more")
        missing = set(range(len(self.header.shapes))) - self._come.keys()
        if missing:
            raise TruncatedError(
                f"nothing of layers {spans(missing)} has come yet; wait for more, or write the stream in tiers"
            )
        share = 1.0 if len(self._whole) == len(self.header.shapes) else self._entries() / (self.header.entries or 1)
        return Partial(self._cache(self.header), share, self.total_bytes - len(self._buffer))

    def positions(self) -> list[list[Numbers]]:
        """Prompt tokens that each head of each layer keeps, by the frames so far: int64 ``[kept]``, ascending.

        Raises
        ------
        CorruptError
            Two frames hold the same token.
        """
        if self.header is None:
            return []
        joint = isinstance(self._coder, JointCoder)
        return [self._places.rows(0 if joint else i, x.kv_heads) for i, x in enumerate(self.header.shapes)]

    def _cache(self, header: Header) -> KVCache:
        if self._wanted is not None:
            raise InputError(
                "this reader keeps single layers, see its `layers`, or none; make one without layers= and decode="
            )
        return KVCache(
            layers=tuple(self.layers[i] for i in range(len(header.shapes))),
            layout=header.layout,
            length=header.length,
            fingerprint=header.fingerprint,
            recipe=header.recipe,
            model_name=header.model_name,
        )

    def _entries(self) -> int:
        return sum(frame.entries for frame in self.frames)

    def _read_start(self) -> int:
        """Check magic and version once; returns how many bytes they take in the buffer."""
        if self._started:
            return 0
        if not MAGIC.startswith(self._buffer[: len(MAGIC)]):
            raise CorruptError(f"not a kvferry bitstream: it does not start with {MAGIC.decode()}")
        if len(self._buffer) < len(START):
            return 0
        version = self._buffer[len(MAGIC)]
        if version > VERSION:
            raise VersionError(f"the bitstream is of version {version}, this kvferry reads {VERSION}; update it")
        if version != VERSION:
            raise VersionError(f"the bitstream is of version {version}, this kvferry reads {VERSION}; write it again")
        self._started = True
        return len(START)

    def _read_records(self, start: int) -> int:
        """Take every record that is entirely in the buffer from ``start`` on; returns where the next one starts."""
        while self._started and (prefix := read_prefix(self._buffer, start)) is not None:
            limit = self._limit(prefix.kind)
            if prefix.size > limit:
                raise CorruptError(
                    f"a record of kind {prefix.kind} and {prefix.size} bytes, where at most {limit} are possible"
                )
            stop = prefix.body + prefix.size
            if len(self._buffer) < stop + CHECKSUM.size:
                break
            with memoryview(self._buffer) as octets:
                framed, body = bytes(octets[start : prefix.body]), bytes(octets[prefix.body : stop])
            if self._chain.checksum(framed, body) != self._buffer[stop : stop + CHECKSUM.size]:
                raise CorruptError(
                    f"the checksum of a record of kind {prefix.kind} is wrong; have the stream sent again"
                )
            self._take(prefix.kind, body, stop + CHECKSUM.size - start)
            start = stop + CHECKSUM.size
        return start

    def _limit(self, kind: int) -> int:
        """The largest size that a record of this kind can have."""
        if self.header is None:
            return self._bounds.header_bytes if kind in (Kind.HEADER, Kind.HEADER_ZSTD) else MAX_HEADER
        if kind != Kind.FRAME:
            return MAX_SMALL
        limits = [self._layer_limit(shape) for shape in self.header.shapes]
        return (sum(limits) if isinstance(self._coder, JointCoder) else max(limits)) + 1024

    def _layer_limit(self, shape: Shape) -> int:
        """Bytes that no codec needs for one layer: all tokens in float32, and their positions."""
        length = self.header.length if self.header else 0
        return length * shape.kv_heads * (4 * (shape.key_dim + shape.value_dim) + 8)

    def _take(self, kind: int, body: bytes, size: int) -> None:
        """One record, of ``size`` bytes in all."""
        if self.complete:
            raise CorruptError("a record follows the end of the stream")
        if kind >= FIRST_OPTIONAL_KIND:
            return
        if kind not in list(Kind):
            raise VersionError(f"records of kind {kind} come from a newer version; update kvferry")
        if (self.header is None) != (kind in (Kind.HEADER, Kind.HEADER_ZSTD)):
            raise CorruptError(f"a {Kind(kind).name} record in the wrong place")
        if self.header is None:
            limit = self._bounds.header_bytes
            self._take_header(decompress(body, limit) if kind == Kind.HEADER_ZSTD else body)
            self.header_bytes = len(START) + size
        elif kind == Kind.FRAME:
            self._take_frame(self.header, parse(pb.Frame, body), size)
        else:
            parse(pb.Trailer, body)
            self._take_trailer(self.header)

    def _take_header(self, body: bytes) -> None:
        self._reserve(2 * len(body))
        header = headers.decode(parse(pb.Header, body, self._bounds.header_fields), self._bounds)
        self._reserve(_LAYOUT_BYTES * len(header.layout))
        self._compressed = header.lossless
        codec = header.codec
        self._coder: Codec | JointCoder = decoder_of(codec, header.fingerprint)
        self._remembers = self._coder is not codec
        if isinstance(self._coder, JointCoder) and len(set(header.shapes)) > 1:
            raise CorruptError("layers of different shapes, which this codec cannot hold")
        self._places = Places(header.layout.visual[: header.length])
        self.header = header

    def _take_frame(self, header: Header, message: pb.Frame, size: int) -> None:
        layer = message.layer if message.HasField("layer") else self._next
        if layer >= len(header.shapes) or layer in self._whole:
            raise CorruptError(f"a frame for layer {layer}, which does not exist or was whole already")
        joint = isinstance(self._coder, JointCoder)
        if joint and layer:
            raise CorruptError(f"a frame of layer {layer} alone, where the codec holds all layers together")
        kept = self._places.read(message, layer, header.shapes[layer].kv_heads)
        unpacked = len(message.payload)
        layers = range(len(header.shapes)) if joint else range(layer, layer + 1)
        if not self._decodes:
            unpacked = len(self._unpack(header, layers, kept, message))
        elif self._wanted is None or not self._wanted.isdisjoint(layers) or self._remembers:
            unpacked = self._decode(header, layers, kept, message)
        tier = self._come.get(layer, 0)
        for each in layers:
            self._come[each] = tier + 1
            if message.last or tier + 1 == header.tiers:
                self._whole.add(each)
        self._next = layers[-1] + 1 if layers[-1] + 1 < len(header.shapes) else 0
        self.frames.append(size_of(message, header, layers, tier, kept, unpacked, size))

    def _unpack(self, header: Header, layers: range, kept: Kept, message: pb.Frame) -> bytes:
        """The payload of a frame as it was before the lossless stage."""
        shape, payload = header.shapes[layers[0]], message.payload
        entries = kept.rows.size * (1 if kept.counts else shape.kv_heads // len(kept.rows)) * len(layers)
        per_token = shape.key_dim + shape.value_dim
        if self._compressed and not message.stored:
            payload = decompress(payload, entries * (8 * per_token + 64) + MAX_SMALL)
        self._reserve(len(payload) + (entries * (2 * per_token + 8) if self._decodes else 0))
        return payload

    def _decode(self, header: Header, layers: range, kept: Kept, message: pb.Frame) -> int:
        """Keep the tokens of a frame; returns how large its payload was before the lossless stage."""
        shape, payload = header.shapes[layers[0]], self._unpack(header, layers, kept, message)
        index = torch.from_numpy(kept.rows).expand(1 if kept.counts else shape.kv_heads, -1).contiguous()
        if isinstance(self._coder, JointCoder):
            if len(kept.rows) != 1 or kept.counts or shape.key_dim != shape.value_dim:
                raise CorruptError("heads that keep different tokens, which this codec cannot hold")
            every = (len(layers), shape.kv_heads, index.shape[1], shape.key_dim)
            pairs = list(zip(*self._coder.decode_tokens(payload, every, index[0], header.layout), strict=True))
        else:
            shapes = ((*index.shape, shape.key_dim), (*index.shape, shape.value_dim))
            pairs = [self._coder.decode(layers[0], payload, *shapes, index, header.layout)]
        for layer, (keys, values) in zip(layers, pairs, strict=True):
            check_numbers(layer, keys=keys, values=values)
            if self._wanted is None or layer in self._wanted:
                device = self._device
                tokens = LayerCache(keys.to(device), values.to(device), index.to(device), kept.counts)
                self.layers[layer] = _merge(self.layers[layer], tokens) if layer in self.layers else tokens
        return len(payload)

    def _take_trailer(self, header: Header) -> None:
        missing = set(range(len(header.shapes))) - self._whole
        if missing:
            raise CorruptError(f"the stream ends without all of layers {spans(missing)}")
        if header.entries is not None and header.entries != self._entries():
            raise CorruptError(f"{self._entries()} tokens came, where {header.entries} were announced")
        self.complete = True


def spans(layers: Collection[int]) -> str:
    """``0, 2 to 5, 9``."""
    text: list[str] = []
    ordered = sorted(layers)
    for layer in ordered:
        if layer - 1 not in layers:
            last = next(x for x in range(layer, layer + len(ordered)) if x + 1 not in layers)
            text.append(str(layer) if last == layer else f"{layer} to {last}")
    return ", ".join(text)


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
