"""Which tokens a frame holds, in the smallest of four forms."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvferry.errors import CorruptError
from kvferry.wire.bitstream_pb2 import Positions

Rows = npt.NDArray[np.int64]
_SHIFTS = np.arange(5, dtype=np.uint64) * np.uint64(7)


def encode(rows: Rows, length: int, seen: dict[bytes, int]) -> Positions:
    """The message for ``rows`` (``[heads, kept]``, ascending, below ``length``).

    Rows that are all equal are stored once. ``seen`` maps the :func:`key` of what earlier frames held to their
    numbers, and a repetition is stored as that number.
    """
    rows = _distinct(rows)
    heads, kept = rows.shape
    message = Positions(kept=kept, rows=heads if heads > 1 else 0)
    known = seen.get(key(rows))
    if known is not None:
        message.frame = known
        return message
    flat = (rows + length * np.arange(heads)[:, None]).reshape(-1)
    mask = np.zeros(heads * length, bool)
    mask[flat] = True
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    forms = {
        "runs": write_varints(np.diff(edges, prepend=0)),
        "gaps": write_varints(np.diff(flat, prepend=-1) - 1),
        "bitmap": np.packbits(mask, bitorder="little").tobytes(),
    }
    smallest = min(forms, key=lambda form: len(forms[form]))
    setattr(message, smallest, forms[smallest])
    return message


def key(rows: Rows) -> bytes:
    """Equal for equal selections."""
    rows = _distinct(rows)
    return bytes([len(rows) > 1]) + np.ascontiguousarray(rows).tobytes()


def decode(message: Positions, length: int, heads: int, earlier: list[Rows]) -> Rows:
    """The rows (``[1 or heads, kept]``) back, or :class:`CorruptError`; nothing large is allocated unchecked."""
    kept, count = message.kept, message.rows or 1
    if count not in (1, heads) or kept > length:
        raise CorruptError(f"{count} rows of {kept} positions do not fit {heads} heads and {length} tokens")
    form = message.WhichOneof("form")
    if form == "frame":
        if message.frame >= len(earlier):
            raise CorruptError(f"positions refer to frame {message.frame}, which has not come yet")
        rows = earlier[message.frame]
        if rows.shape != (count, kept) or (kept and int(rows[:, -1].max()) >= length):
            raise CorruptError(f"positions refer to frame {message.frame}, which is of another shape")
        return rows
    if form == "runs":
        flat = _from_runs(read_varints(message.runs, count * length), count * kept)
    elif form == "gaps":
        flat = np.cumsum(read_varints(message.gaps, count * length) + 1) - 1
    elif form == "bitmap":
        if len(message.bitmap) != -(-count * length // 8):
            raise CorruptError(f"a bitmap of {len(message.bitmap)} bytes for {count} x {length} tokens")
        flat = np.flatnonzero(np.unpackbits(np.frombuffer(message.bitmap, np.uint8), bitorder="little"))
    else:
        raise CorruptError("a frame without positions")
    if len(flat) != count * kept:
        raise CorruptError(f"{len(flat)} positions, where {count} x {kept} were announced")
    rows = flat.reshape(count, kept) - length * np.arange(count)[:, None]
    if kept and (int(rows.min()) < 0 or int(rows.max()) >= length):
        raise CorruptError("a position lies outside the prompt")
    return rows


def write_varints(values: Rows) -> bytes:
    """LEB128 of non-negative numbers below ``2**35``."""
    wide = values.astype(np.uint64)[:, None] >> _SHIFTS
    used = wide > 0
    used[:, 0] = True
    wide &= np.uint64(0x7F)
    wide[:, :-1] |= used[:, 1:].astype(np.uint64) << np.uint64(7)
    return wide[used].astype(np.uint8).tobytes()


def read_varints(data: bytes, limit: int) -> Rows:
    """What :func:`write_varints` wrote; :class:`CorruptError` where a number exceeds ``limit``."""
    octets = np.frombuffer(data, np.uint8)
    if not len(octets):
        return np.zeros(0, np.int64)
    ends = np.flatnonzero(octets < 0x80)
    if not len(ends) or ends[-1] != len(octets) - 1:
        raise CorruptError("a number in the positions has no end")
    starts = np.concatenate([[0], ends[:-1] + 1])
    sizes = ends - starts + 1
    if sizes.max() > 5:
        raise CorruptError("a number in the positions is too long")
    rank = np.arange(len(octets)) - np.repeat(starts, sizes)
    values: Rows = np.add.reduceat((octets & 0x7F).astype(np.int64) << (7 * rank), starts)
    if int(values.max()) > limit:
        raise CorruptError(f"a number in the positions exceeds {limit}")
    return values


def _distinct(rows: Rows) -> Rows:
    return rows[:1] if (rows == rows[:1]).all() else rows


def _from_runs(runs: Rows, total: int) -> Rows:
    kept = runs[1::2]
    if len(runs) % 2 or int(kept.sum()) != total:
        raise CorruptError(f"runs of {int(kept.sum())} positions, where {total} were announced")
    starts = np.cumsum(runs)[::2]
    before = np.cumsum(kept) - kept
    return np.repeat(starts - before, kept) + np.arange(total)
