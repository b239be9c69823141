"""A stream that is there as a whole, to a cache."""

from __future__ import annotations

from collections.abc import Collection

from kvferry.bitstream.reader import Reader, spans
from kvferry.cache import KVCache, LayerCache
from kvferry.errors import InputError, TruncatedError
from kvferry.lazy import torch

PIECE = 1 << 20
"""Bytes that a reader is given at a time: it copies them, and lets go of a frame when that is decoded."""


def decompress_stream(blob: bytes, device: str | torch.device = "cpu") -> KVCache:
    """The cache in ``blob``, a whole stream."""
    reader = Reader(device)
    _feed_pieces(reader, blob)
    return reader.cache()


def _feed_pieces(reader: Reader, blob: bytes) -> None:
    """A whole stream, piece by piece: a reader copies what it is fed, and lets go of a frame when it is decoded."""
    for start in range(0, len(blob), PIECE):
        reader.feed(blob[start : start + PIECE])


def decompress_layers(
    blob: bytes, layers: Collection[int], device: str | torch.device = "cpu"
) -> dict[int, LayerCache]:
    """Some layers of the cache in ``blob``, a whole stream; see :class:`Reader` for what is skipped.

    Raises
    ------
    BitstreamError
        As :meth:`Reader.feed`; checksums and positions of all frames are checked.
    InputError
        The stream has no such layer.
    """
    reader = Reader(device, layers=layers)
    _feed_pieces(reader, blob)
    if not reader.complete or reader.header is None:
        raise TruncatedError(f"the stream ends after {len(blob)} bytes, before its trailer; have it sent again")
    missing = set(layers) - reader.layers.keys()
    if missing:
        raise InputError(f"the stream has layers 0 to {len(reader.header.shapes) - 1}, none numbered {spans(missing)}")
    return reader.layers
