"""A cache to bytes, record by record."""

from __future__ import annotations

from kvferry.bitstream import header as headers
from kvferry.bitstream import positions
from kvferry.bitstream.positions import Places
from kvferry.bitstream.records import START, Chain, Kind, compress
from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs import Codec, encoder_of
from kvferry.errors import InputError


class Writer:
    """Writes one stream: :meth:`header`, then any number of :meth:`frame`, then :meth:`trailer`.

    Parameters
    ----------
    codec
        Encodes the payloads. The recipe of the cache must name it, for that is where the reader looks. Where that
        recipe ends in ``zstd``, each payload that gets smaller by it is compressed.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._chain = Chain()
        self._layout: PromptLayout | None = None

    def header(self, cache: KVCache, tiers: int = 1) -> bytes:
        """Magic, version and header. Of the cache's layers only shapes, dtypes and counts are read.

        No layer has more frames than ``tiers``.
        """
        if not 1 <= tiers <= headers.MAX_TIERS:
            raise InputError(f"a cache is cut into 1 to {headers.MAX_TIERS} tiers, not {tiers}")
        self._layout, self._lossless = cache.layout, headers.lossless(cache.recipe)
        self._places = Places(cache.layout.visual[: cache.length])
        self._codec = encoder_of(self._codec, cache.fingerprint, len(cache.layers))
        self._layers, self._tiers = len(cache.layers), tiers
        self._next = 0
        self._written: dict[int, int] = {}
        body = headers.encode(cache, tiers).SerializeToString()
        packed = compress(body)
        if len(packed) < len(body):
            return START + self._chain.record(Kind.HEADER_ZSTD, packed)
        return START + self._chain.record(Kind.HEADER, body)

    def frame(self, layer: int, tokens: LayerCache, more: bool = False) -> bytes:
        """Some or all kept ``tokens`` of ``layer``; ``more`` says that another frame of this layer will follow."""
        if self._layout is None:
            raise InputError("write the header before the first frame")
        self._written[layer] = count = self._written.get(layer, 0) + 1
        if count + more > self._tiers:
            raise InputError(f"more frames for layer {layer} than the {self._tiers} tiers that the header announces")
        kept = positions.distinct(tokens.positions.cpu().numpy(), tokens.counts)
        message = self._places.write(kept, layer, tokens.heads)
        if layer != self._next:
            message.layer = layer
        self._next = (layer + 1) % self._layers
        message.last = not more and count < self._tiers
        payload = self._codec.encode(layer, tokens.keys, tokens.values, tokens.positions, self._layout)
        packed = compress(payload) if self._lossless else payload
        message.stored = self._lossless and len(packed) >= len(payload)
        message.payload = payload if message.stored else packed
        return self._chain.record(Kind.FRAME, message.SerializeToString())

    def trailer(self) -> bytes:
        """The end of the stream."""
        return self._chain.record(Kind.TRAILER, b"")
