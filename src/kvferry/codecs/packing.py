"""Small integers <-> bytes, really packed: ``m`` values of ``b`` bits take ``ceil(m * b / 8)`` bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


def packed_size(count: int, bits: int) -> int:
    """Bytes that ``count`` values of ``bits`` bits take."""
    return -(-count * bits // 8)


def pack(values: Bytes, bits: int) -> Bytes:
    """Pack ``values`` (uint8 ``[m]``, each below ``2**bits``), least significant bits first.

    Eight values make ``bits`` bytes: they are gathered in one 64-bit word, whose low bytes are kept.
    """
    if bits == 8:
        return values
    if bits == 1:
        return np.packbits(values, bitorder="little")
    if bits in (2, 4):
        lanes = _padded(values, 8 // bits)
        out = lanes[:, 0].copy()
        for lane in range(1, 8 // bits):
            out |= lanes[:, lane] << (lane * bits)
        return out
    lanes = _padded(values, 8)
    words = lanes[:, 0].astype("<u8")
    for lane in range(1, 8):
        words |= lanes[:, lane].astype("<u8") << np.uint64(lane * bits)
    out = words.view(np.uint8).reshape(-1, 8)[:, :bits]
    return np.ascontiguousarray(out).reshape(-1)[: packed_size(len(values), bits)]


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """The ``count`` values (uint8) in ``packed``, which has ``packed_size(count, bits)`` bytes."""
    if bits == 8:
        return packed
    if bits == 1:
        return np.unpackbits(packed, count=count, bitorder="little")
    mask = (1 << bits) - 1
    if bits in (2, 4):
        out = np.empty((len(packed), 8 // bits), np.uint8)
        for lane in range(8 // bits):
            out[:, lane] = (packed >> (lane * bits)) & mask
        return out.reshape(-1)[:count]
    groups = -(-count // 8)
    padded = np.zeros((groups, 8), np.uint8)
    body = np.zeros(groups * bits, np.uint8)
    body[: len(packed)] = packed
    padded[:, :bits] = body.reshape(groups, bits)
    words = padded.view("<u8").reshape(-1)
    out = np.empty((groups, 8), np.uint8)
    for lane in range(8):
        out[:, lane] = (words >> np.uint64(lane * bits)) & np.uint64(mask)
    return out.reshape(-1)[:count]


def _padded(values: Bytes, lanes: int) -> Bytes:
    """``values`` as ``[groups, lanes]``, filled up with zeros."""
    missing = -len(values) % lanes
    if missing:
        values = np.concatenate([values, np.zeros(missing, np.uint8)])
    return values.reshape(-1, lanes)
