"""Which tokens a frame holds, in the smallest of five forms, or as an earlier frame has them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.bitstream import contexts
from kvferry.bitstream.contexts import Contexts
from kvferry.bitstream.varints import Numbers, read_varint, read_varints, write_varint, write_varints
from kvferry.errors import CorruptError
from kvferry.wire.bitstream_pb2 import Frame

Mask = npt.NDArray[np.bool_]


class Kept(NamedTuple):
    """Positions of one frame: ``rows`` is ``[1 or heads, kept]``, ascending.

    Where heads keep differently many, ``counts`` says how many each keeps, and ``rows`` is ``[1, sum(counts)]``, the
    heads end to end.
    """

    rows: Numbers
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

    def numbers(self, length: int) -> Numbers:
        """``r * length + p`` for every token ``p`` of every row ``r``, ascending."""
        flat: Numbers = self.rows.reshape(-1) + length * np.repeat(
            np.arange(self.heads), self.counts or self.rows.shape[1]
        )
        return flat

    def mask(self, length: int, most: int | None = None) -> Mask:
        """Bool ``[heads, length]``, of at most the first ``most`` heads."""
        heads, numbers = self.heads, self.numbers(length)
        if most is not None and most < heads:
            heads, numbers = most, numbers[numbers < most * length]
        mask = np.zeros(heads * length, bool)
        mask[numbers] = True
        return mask.reshape(heads, length)


def distinct(rows: Numbers, counts: tuple[int, ...] = ()) -> Kept:
    """``rows`` (``[heads, kept]``, or one long row with ``counts``), stored once where all heads keep the same."""
    same = not counts and bool((rows == rows[:1]).all())
    return Kept(rows[:1] if same else rows, counts)


class Places:
    """What writer and reader of one stream remember of positions.

    Parameters
    ----------
    visual : bool ``[length]``
        Which of the prompt's tokens are visual.
    """

    def __init__(self, visual: Mask) -> None:
        self.length = len(visual)
        self.frames: list[Kept] = []
        self._numbers: dict[bytes, int] = {}
        self._layers: dict[int, list[Kept]] = {}
        self._contexts = Contexts(visual)

    def write(self, kept: Kept, layer: int, heads: int) -> Frame:
        """A frame with the positions of ``kept`` and nothing else in it."""
        frame = Frame()
        known = self._numbers.get(kept.key)
        if known is not None:
            if known != len(self.frames) - 1:
                frame.frame = known
        else:
            frame.shared = kept.heads == 1 < heads
            self._write(frame, kept, layer)
        self._note(kept, layer)
        return frame

    def read(self, frame: Frame, layer: int, heads: int) -> Kept:
        """The positions of a frame, or :class:`CorruptError`; nothing large is allocated unchecked."""
        form = frame.WhichOneof("positions")
        if form is None or form == "frame":
            number = frame.frame if form else len(self.frames) - 1
            if not 0 <= number < len(self.frames):
                raise CorruptError(f"positions as in frame {number}, which has not come yet")
            kept = self.frames[number]
            if frame.shared or kept.heads not in (1, heads):
                raise CorruptError(f"positions as in frame {number}, which is of another shape")
        else:
            kept = self._read(frame, form, layer, 1 if frame.shared else heads)
        self._note(kept, layer)
        return kept

    def rows(self, layer: int, heads: int) -> list[Numbers]:
        """What all frames of ``layer`` hold by head, ascending; :class:`CorruptError` where two hold a token."""
        parts: list[list[Numbers]] = [[] for _ in range(heads)]
        for kept in self._layers.get(layer, ()):
            each = np.split(kept.rows[0], np.cumsum(kept.counts)[:-1]) if kept.counts else list(kept.rows)
            for mine, row in zip(parts, each * (heads if len(each) == 1 else 1), strict=True):
                mine.append(row)
        merged = [np.sort(np.concatenate([np.empty(0, np.int64), *mine])) for mine in parts]
        if any(bool((np.diff(row) == 0).any()) for row in merged):
            raise CorruptError("two frames hold the same token")
        return merged

    def _write(self, frame: Frame, kept: Kept, layer: int) -> None:
        """The smallest form."""
        flat, mask = kept.numbers(self.length), kept.mask(self.length)
        edges = np.flatnonzero(np.diff(mask.reshape(-1), prepend=False, append=False))
        forms = {
            "runs": write_varints(np.diff(edges, prepend=0)),
            "sparse": write_sparse(flat, mask.size),
            "bitmap": np.packbits(mask.reshape(-1), bitorder="little").tobytes(),
        }
        trial = self._contexts
        if mask.size <= contexts.MOST:
            trial = self._contexts.copy()
            forms["coded"] = trial.encode(mask, self._held(layer, kept.heads), self._guide(kept.heads))
        smallest = min(forms, key=lambda form: len(forms[form]))
        if smallest == "coded":
            self._contexts = trial
        setattr(frame, smallest, forms[smallest])

    def _read(self, frame: Frame, form: str, layer: int, rows: int) -> Kept:
        limit = rows * self.length
        data: bytes = getattr(frame, form)
        if form == "coded":
            if limit > contexts.MOST:
                raise CorruptError(f"coded positions of {limit} tokens (possible are {contexts.MOST})")
            flat = np.flatnonzero(self._contexts.decode(data, self._held(layer, rows), self._guide(rows)))
        elif form == "sparse":
            flat = read_sparse(data, limit)
        elif form == "runs":
            flat = _from_runs(read_varints(data, limit), limit)
        else:
            if len(data) != -(-limit // 8):
                raise CorruptError(f"a bitmap of {len(data)} bytes for {limit} tokens")
            flat = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little"))
        if len(flat) and (int(flat[-1]) >= limit or bool((np.diff(flat) <= 0).any())):
            raise CorruptError("a position lies outside the prompt, or stands twice")
        counts = tuple(np.bincount(flat // self.length, minlength=rows).tolist())
        ragged = len(set(counts)) > 1
        return Kept((flat % self.length).reshape(1 if ragged else rows, -1), counts if ragged else ())

    def _held(self, layer: int, rows: int) -> Mask:
        """What earlier frames of ``layer`` hold, bool ``[rows, length]``; one row stands for all heads."""
        held = np.zeros((rows, self.length), bool)
        for kept in self._layers.get(layer, ()):
            if rows == 1:
                held[0, kept.rows.reshape(-1)] = True
            else:
                held |= kept.mask(self.length)
        return held

    def _guide(self, rows: int) -> Mask | None:
        return self.frames[-1].mask(self.length, rows) if self.frames else None

    def _note(self, kept: Kept, layer: int) -> None:
        self._layers.setdefault(layer, []).append(kept)
        self._numbers[kept.key] = len(self.frames)
        self.frames.append(kept)


def write_sparse(numbers: Numbers, limit: int) -> bytes:
    """Elias-Fano code of ascending ``numbers`` below ``limit``.

    Their count as a varint; then, in one string of bits, least significant first: the ``l`` low bits of every number,
    and the high parts in unary: as many zeros as the high part grows from the number before, then a one.
    ``l = floor(log2(limit / count))``.
    """
    count = len(numbers)
    low = _low_bits(count, limit)
    highs = (numbers >> low) + np.arange(count)
    unary = np.zeros(int(highs[-1]) + 1 if count else 0, bool)
    unary[highs] = True
    bits = (numbers[:, None] >> np.arange(low) & 1).astype(bool).reshape(-1)
    return write_varint(count) + np.packbits(np.concatenate([bits, unary]), bitorder="little").tobytes()


def read_sparse(data: bytes, limit: int) -> Numbers:
    """What :func:`write_sparse` wrote, ascending but not yet checked against ``limit``."""
    head = read_varint(data, 0)
    if head is None:
        raise CorruptError("sparse positions without a count")
    count, start = head
    bits = np.unpackbits(np.frombuffer(data, np.uint8, offset=start), bitorder="little")
    low = _low_bits(count, limit)
    if count > limit or count * (low + 1) > len(bits):
        raise CorruptError(f"{count} sparse positions in {len(data)} bytes for {limit} tokens")
    ones = np.flatnonzero(bits[count * low :])
    if len(ones) != count:
        raise CorruptError(f"{len(ones)} sparse positions, where {count} were announced")
    lows = bits[: count * low].reshape(count, low).astype(np.int64) << np.arange(low)
    numbers: Numbers = ((ones - np.arange(count)) << low) + lows.sum(1)
    return numbers


def _low_bits(count: int, limit: int) -> int:
    return max((limit // count).bit_length() - 1, 0) if count else 0


def _from_runs(runs: Numbers, limit: int) -> Numbers:
    kept = runs[1::2]
    total = int(kept.sum())
    if len(runs) % 2 or total > limit:
        raise CorruptError(f"runs of {total} positions for {limit} tokens")
    starts = np.cumsum(runs)[::2]
    before = np.cumsum(kept) - kept
    return np.repeat(starts - before, kept) + np.arange(total)
