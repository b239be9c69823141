"""LEB128: numbers of seven bits a byte, least significant first."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvferry.errors import CorruptError

Numbers = npt.NDArray[np.int64]
MOST_BYTES = 5
_SHIFTS = np.arange(MOST_BYTES, dtype=np.uint64) * np.uint64(7)


def write_varints(values: Numbers) -> bytes:
    """LEB128 of non-negative numbers below ``2**35``."""
    wide = values.astype(np.uint64)[:, None] >> _SHIFTS
    used = wide > 0
    used[:, 0] = True
    wide &= np.uint64(0x7F)
    wide[:, :-1] |= used[:, 1:].astype(np.uint64) << np.uint64(7)
    return wide[used].astype(np.uint8).tobytes()


def read_varints(data: bytes, limit: int) -> Numbers:
    """What :func:`write_varints` wrote; :class:`CorruptError` where a number exceeds ``limit``."""
    octets = np.frombuffer(data, np.uint8)
    if not len(octets):
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(octets < 0x80)
    if not len(ends) or ends[-1] != len(octets) - 1:
        raise CorruptError("a number in the positions has no end")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > MOST_BYTES:
        raise CorruptError("a number in the positions is too long")
    rank = np.arange(len(octets)) - np.repeat(starts, sizes)
    values: Numbers = np.add.reduceat((octets & 0x7F).astype(np.int64) << (7 * rank), starts)
    if int(values.max()) > limit:
        raise CorruptError(f"a number in the positions exceeds {limit}")
    return values


def write_varint(value: int) -> bytes:
    """One number."""
    return write_varints(np.array([value], np.int64))


def read_varint(data: bytes | bytearray, start: int) -> tuple[int, int] | None:
    """The number at ``start`` and where it stops; ``None`` where ``data`` ends within it."""
    value = 0
    for place, octet in enumerate(data[start : start + MOST_BYTES]):
        value |= (octet & 0x7F) << 7 * place
        if octet < 0x80:
            return value, start + place + 1
    if len(data) - start >= MOST_BYTES:
        raise CorruptError("a number is too long")
    return None
