"""ICC profiles without what names a screen, a maker or a day: a screenshot's tells its display's serial number."""

from __future__ import annotations

import struct

_KEPT = frozenset(
    b"rXYZ gXYZ bXYZ rTRC gTRC bTRC kTRC wtpt bkpt chad chrm A2B0 A2B1 A2B2 B2A0 B2A1 B2A2 D2B0 D2B1 D2B2 gamt".split()
)
_HEADER = 128
_FORGOTTEN = ((4, 8), (24, 36), (40, 44), (48, 56), (80, 100))
"""Ranges of a header that colours do not need: engine, date, platform, maker and model, creator and digest."""


def plain_profile(icc: bytes) -> bytes:
    """The same profile with the tags that its colours need and nothing else.

    Raises
    ------
    ValueError, struct.error
        It is not built as a profile.
    """
    (count,) = struct.unpack_from(">I", icc, _HEADER)
    if len(icc) < _HEADER + 4 + 12 * count:
        raise ValueError("cut off")
    tags = [struct.unpack_from(">4sII", icc, _HEADER + 4 + 12 * index) for index in range(count)]
    tags = [tag for tag in tags if tag[0] in _KEPT]
    header = bytearray(icc[:_HEADER])
    for begin, end in _FORGOTTEN:
        header[begin:end] = bytes(end - begin)
    header[36:40] = b"acsp"
    table, bodies, placed = b"", b"", dict[tuple[int, int], int]()
    first = _HEADER + 4 + 12 * len(tags)
    for name, begin, size in tags:
        if begin + size > len(icc):
            raise ValueError("cut off")
        if (begin, size) not in placed:
            placed[begin, size] = first + len(bodies)
            bodies += icc[begin : begin + size] + bytes(-size % 4)
        table += struct.pack(">4sII", name, placed[begin, size], size)
    header[:4] = struct.pack(">I", first + len(bodies))
    return bytes(header) + struct.pack(">I", len(tags)) + table + bodies
