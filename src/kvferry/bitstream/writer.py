"""A cache to bytes, record by record."""

from __future__ import annotations

from kvferry.bitstream import header as headers
from kvferry.bitstream import positions
from kvferry.bitstream.records import CHECKSUM, MAGIC, VERSION, Kind, compress, crc32c, record
from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs import Codec, encoder_of
from kvferry.errors import InputError
from kvferry.wire.bitstream_pb2 import Frame, Trailer


class Writer:
    """Writes one stream: :meth:`header`, then any number of :meth:`frame`, then :meth:`trailer`.

    Parameters
    ----------
    codec
        Encodes the payloads. The header's recipe must name it, for that is where the reader looks.
    lossless : bool
        Compress each payload by zstd where that makes it smaller.
    """

    def __init__(self, codec: Codec, lossless: bool = False) -> None:
        self._codec = codec
        self._lossless = lossless
        self._layout: PromptLayout | None = None
        self._length = 0
        self._seen: dict[bytes, int] = {}
        self._frames = 0
        self._checksums = bytearray()

    def header(self, cache: KVCache) -> bytes:
        """Magic, version and header. Of the cache's layers only shapes and dtypes are read."""
        self._layout, self._length = cache.layout, cache.length
        self._codec = encoder_of(self._codec, cache.fingerprint, len(cache.layers))
        body = headers.encode(cache).SerializeToString()
        packed = compress(body)
        if len(packed) < len(body):
            return MAGIC + bytes([VERSION]) + self._record(Kind.HEADER_ZSTD, packed)
        return MAGIC + bytes([VERSION]) + self._record(Kind.HEADER, body)

    def frame(self, layer: int, tokens: LayerCache, more: bool = False) -> bytes:
        """Some or all kept ``tokens`` of ``layer``; ``more`` says that another frame of this layer will follow."""
        if self._layout is None:
            raise InputError("write the header before the first frame")
        kept = positions.distinct(tokens.positions.cpu().numpy(), tokens.counts)
        where = positions.encode(kept, self._length, self._seen)
        self._seen.setdefault(kept.key, self._frames)
        self._frames += 1
        payload = self._codec.encode(layer, tokens.keys, tokens.values, tokens.positions, self._layout)
        message = Frame(layer=layer, more=more, positions=where)
        packed = compress(payload) if self._lossless else payload
        message.zstd = len(packed) < len(payload)
        message.payload = packed if message.zstd else payload
        return self._record(Kind.FRAME, message.SerializeToString())

    def trailer(self) -> bytes:
        """The end of the stream."""
        message = Trailer(frames=self._frames, digest=crc32c(bytes(self._checksums)))
        return self._record(Kind.TRAILER, message.SerializeToString())

    def _record(self, kind: Kind, body: bytes) -> bytes:
        framed = record(kind, body)
        self._checksums += framed[-CHECKSUM.size :]
        return framed
