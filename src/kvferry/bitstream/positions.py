"""Which tokens a frame holds, in the smallest of four forms."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.errors import CorruptError
from kvferry.wire.bitstream_pb2 import Positions

Rows = npt.NDArray[np.int64]
_SHIFTS = np.arange(5, dtype=np.uint64) * np.uint64(7)


class Kept(NamedTuple):
    """Positions of one frame: ``rows`` is ``[1 or heads, kept]``, ascending.

    Where heads keep differently many, ``counts`` says how many each keeps, and ``rows`` is ``[1, sum(counts)]``, the
    heads end to end.
    """

    rows: Rows
    counts: tuple[int, ...] = ()

    @property
    def heads(self) -> int:
        """Rows that differ."""
        return len(self.counts) or len(self.rows)

    @property
    def key(self) -> bytes:
        """Equal for equal selections."""
        shape = np.array([len(self.rows), len(self.counts), *self.counts], np.int64)
        return shape.tobytes() + np.ascontiguousarray(self.rows).tobytes()


def distinct(rows: Rows, counts: tuple[int, ...] = ()) -> Kept:
    """``rows`` (``[heads, kept]``, or one long row with ``counts``), stored once where all heads keep the same."""
    same = not counts and bool((rows == rows[:1]).all())
    return Kept(rows[:1] if same else rows, counts)


def encode(kept: Kept, length: int, seen: dict[bytes, int]) -> Positions:
    """The message for positions below ``length``.

    ``seen`` maps the :attr:`Kept.key` of what earlier frames held to their numbers, and a repetition is stored as that
    number.
    """
    rows, heads = kept.rows, kept.heads
    message = Positions(kept=rows.shape[1], rows=heads if heads > 1 else 0, ragged=bool(kept.counts))
    known = seen.get(kept.key)
    if known is not None:
        message.frame = known
        return message
    flat = rows.reshape(-1) + length * np.repeat(np.arange(heads), kept.counts or rows.shape[1])
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


def decode(message: Positions, length: int, heads: int, earlier: list[Kept]) -> Kept:
    """The positions back, or :class:`CorruptError`; nothing large is allocated unchecked."""
    count = message.rows or 1
    most = heads * length if message.ragged else length
    if count not in (1, heads) or message.kept > most or (message.ragged and count == 1):
        raise CorruptError(f"{count} rows of {message.kept} positions do not fit {heads} heads and {length} tokens")
    if message.WhichOneof("form") == "frame":
        return _repeated(message, count, length, earlier)
    total = message.kept if message.ragged else count * message.kept
    flat = _numbers(message, count * length, total)
    if total and (int(flat.min()) < 0 or int(flat.max()) >= count * length):
        raise CorruptError("a position lies outside the prompt")
    lengths = tuple(np.bincount(flat // length, minlength=count).tolist())
    if message.ragged == (len(set(lengths)) == 1):
        raise CorruptError(f"heads that keep {lengths} tokens, where {message.kept} were announced for each or for all")
    rows = (flat % length).reshape(1 if message.ragged else count, message.kept)
    return Kept(rows, lengths if message.ragged else ())


def _repeated(message: Positions, count: int, length: int, earlier: list[Kept]) -> Kept:
    """The positions of an earlier frame."""
    if message.frame >= len(earlier):
        raise CorruptError(f"positions refer to frame {message.frame}, which has not come yet")
    kept = earlier[message.frame]
    described = (count, message.kept, message.ragged)
    if described != (kept.heads, kept.rows.shape[1], bool(kept.counts)):
        raise CorruptError(f"positions refer to frame {message.frame}, which is of another shape")
    return kept


def _numbers(message: Positions, limit: int, total: int) -> Rows:
    """The ascending numbers of all rows, ``[total]``; the bytes bear ``total`` out before so much is allocated."""
    form = message.WhichOneof("form")
    if form == "runs":
        flat = _from_runs(read_varints(message.runs, limit), total)
    elif form == "gaps":
        flat = np.cumsum(read_varints(message.gaps, limit) + 1) - 1
    elif form == "bitmap":
        if len(message.bitmap) != -(-limit // 8):
            raise CorruptError(f"a bitmap of {len(message.bitmap)} bytes for {limit} tokens")
        flat = np.flatnonzero(np.unpackbits(np.frombuffer(message.bitmap, np.uint8), bitorder="little"))
    else:
        raise CorruptError("a frame without positions")
    if len(flat) != total:
        raise CorruptError(f"{len(flat)} positions, where {total} were announced")
    return flat


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


def _from_runs(runs: Rows, total: int) -> Rows:
    kept = runs[1::2]
    if len(runs) % 2 or int(kept.sum()) != total:
        raise CorruptError(f"runs of {int(kept.sum())} positions, where {total} were announced")
    starts = np.cumsum(runs)[::2]
    before = np.cumsum(kept) - kept
    return np.repeat(starts - before, kept) + np.arange(total)
