"""A cache to bytes, record by record."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch

from kvferry.bitstream import layout as layouts
from kvferry.bitstream import positions
from kvferry.bitstream.records import CHECKSUM, MAGIC, VERSION, Kind, compress, crc32c, record
from kvferry.cache import KVCache, LayerCache
from kvferry.codecs import Codec
from kvferry.errors import InputError
from kvferry.wire.bitstream_pb2 import BFLOAT16, FLOAT16, FLOAT32, Frame, Header, LayerShape, Trailer

DTYPES = {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16, torch.float32: FLOAT32}


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
        self._cache: KVCache | None = None
        self._seen: dict[bytes, int] = {}
        self._frames = 0
        self._checksums = bytearray()

    def header(self, cache: KVCache) -> bytes:
        """Magic and header. Only the cache's layout, shapes and names are read."""
        self._cache = cache
        shapes = groupby(_shape(layer) for layer in cache)
        message = Header(
            fingerprint=cache.fingerprint,
            model_name=cache.model_name,
            recipe=cache.recipe,
            length=cache.length,
            layout=layouts.encode(cache.layout),
            layers=[
                LayerShape(repeat=len(list(same)), kv_heads=heads, key_dim=key, value_dim=value, dtype=dtype)
                for (heads, key, value, dtype), same in shapes
            ],
        )
        body = message.SerializeToString()
        packed = compress(body)
        if len(packed) < len(body):
            return MAGIC + bytes([VERSION]) + self._record(Kind.HEADER_ZSTD, packed)
        return MAGIC + bytes([VERSION]) + self._record(Kind.HEADER, body)

    def frame(self, layer: int, tokens: LayerCache, more: bool = False) -> bytes:
        """Some or all kept ``tokens`` of ``layer``; ``more`` says that another frame of this layer will follow."""
        if self._cache is None:
            raise InputError("write the header before the first frame")
        rows = tokens.positions.cpu().numpy()
        where = positions.encode(rows, self._cache.length, self._seen)
        self._seen.setdefault(positions.key(rows), self._frames)
        self._frames += 1
        payload = self._codec.encode(layer, tokens.keys, tokens.values, tokens.positions, self._cache.layout)
        message = Frame(layer=layer, more=more, positions=where, payload=payload)
        if self._lossless:
            planes = self._codec.word
            packed = compress(split_planes(payload, planes))
            if len(packed) < len(payload):
                message.payload, message.zstd, message.planes = packed, True, planes if planes > 1 else 0
        return self._record(Kind.FRAME, message.SerializeToString())

    def trailer(self) -> bytes:
        """The end of the stream."""
        message = Trailer(frames=self._frames, digest=crc32c(bytes(self._checksums)))
        return self._record(Kind.TRAILER, message.SerializeToString())

    def _record(self, kind: Kind, body: bytes) -> bytes:
        framed = record(kind, body)
        self._checksums += framed[-CHECKSUM.size :]
        return framed


def split_planes(payload: bytes, planes: int) -> bytes:
    """All first bytes, then all second ones ...: zstd finds the exponents of bfloat16 side by side."""
    if planes <= 1 or len(payload) % planes:
        return payload
    return np.frombuffer(payload, np.uint8).reshape(-1, planes).T.tobytes()


def join_planes(payload: bytes, planes: int) -> bytes:
    """Undo :func:`split_planes`."""
    if planes <= 1 or len(payload) % planes:
        return payload
    return np.frombuffer(payload, np.uint8).reshape(planes, -1).T.tobytes()


def _shape(layer: LayerCache) -> tuple[int, int, int, int]:
    if layer.keys.dtype not in DTYPES:
        raise InputError(f"a cache of {layer.keys.dtype} cannot be encoded; convert it to bfloat16 first")
    return (layer.keys.shape[0], layer.keys.shape[2], layer.values.shape[2], DTYPES[layer.keys.dtype])
