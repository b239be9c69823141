"""A cache to bytes, record by record."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.bitstream import header as headers
from kvferry.bitstream import positions
from kvferry.bitstream.positions import Places
from kvferry.bitstream.records import START, Chain, Kind, compress
from kvferry.cache import KVCache, LayerCache, PromptLayout
from kvferry.codecs import AnyCodec, Codec, JointCoder, encoder_of, for_stage, stack
from kvferry.errors import InputError
from kvferry.wire.bitstream_pb2 import Frame


class Writer:
    """Writes one stream: :meth:`header`, then any number of frames, then :meth:`trailer`.

    A codec that codes all layers together takes :meth:`joint_frame`, any other :meth:`frame`.

    Parameters
    ----------
    codec
        Encodes the payloads. The recipe of the cache must name it, for that is where the reader looks. Where that
        recipe ends in ``zstd``, each payload that gets smaller by it is compressed.
    """

    def __init__(self, codec: AnyCodec) -> None:
        self._codec = codec
        self._coder: Codec | JointCoder | None = None
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
        self._coder = encoder_of(for_stage(self._codec, self._lossless), cache.fingerprint, len(cache.layers))
        self._layers, self._tiers = len(cache.layers), tiers
        self._next = 0
        self._written: dict[int, int] = {}
        body = headers.encode(cache, tiers).SerializeToString()
        packed = compress(body)
        if len(packed) < len(body):
            return START + self._chain.record(Kind.HEADER_ZSTD, packed)
        return START + self._chain.record(Kind.HEADER, body)

    @property
    def joint(self) -> bool:
        """Whether frames are :meth:`joint_frame`; known after the header."""
        return isinstance(self._coder, JointCoder)

    def frame(self, layer: int, tokens: LayerCache, more: bool = False) -> bytes:
        """Some or all kept ``tokens`` of ``layer``; ``more`` says that another frame of this layer will follow."""
        if self._layout is None or not isinstance(self._coder, Codec):
            raise InputError("write the header before the first frame, and all layers at once for this codec")
        message = self._place(layer, tokens, more)
        if layer != self._next:
            message.layer = layer
        self._next = (layer + 1) % self._layers
        payload = self._coder.encode(layer, tokens.keys, tokens.values, tokens.positions, self._layout)
        return self._finish(message, payload)

    def joint_frame(self, layers: Sequence[LayerCache], more: bool = False) -> bytes:
        """Some or all kept tokens of all layers, which must be the same everywhere.

        Raises
        ------
        InputError
            They are not the same.
        """
        if self._layout is None or not isinstance(self._coder, JointCoder):
            raise InputError("write the header before the first frame, and layer by layer for this codec")
        keys, values, where = stack(layers)
        message = self._place(0, layers[0], more)
        return self._finish(message, self._coder.encode_tokens(keys, values, where, self._layout))

    def _place(self, layer: int, tokens: LayerCache, more: bool) -> Frame:
        """A message that says which tokens it holds."""
        self._written[layer] = count = self._written.get(layer, 0) + 1
        if count + more > self._tiers:
            raise InputError(f"more frames for layer {layer} than the {self._tiers} tiers that the header announces")
        kept = positions.distinct(tokens.positions.cpu().numpy(), tokens.counts)
        message = self._places.write(kept, layer, tokens.heads)
        message.last = not more and count < self._tiers
        return message

    def _finish(self, message: Frame, payload: bytes) -> bytes:
        packed = compress(payload) if self._lossless else payload
        message.stored = self._lossless and len(packed) >= len(payload)
        message.payload = payload if message.stored else packed
        return self._chain.record(Kind.FRAME, message.SerializeToString())

    def trailer(self) -> bytes:
        """The end of the stream."""
        return self._chain.record(Kind.TRAILER, b"")
