"""One set of a prompt's visual tokens, or what changed in it, in the smallest of three forms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvferry.bitstream.binary import BitReader, Weights, encode_bits
from kvferry.bitstream.varints import read_varints, write_varints
from kvferry.errors import CorruptError
from kvferry.wire.modes_pb2 import PositionSet

Mask = npt.NDArray[np.bool_]
Grids = Sequence[tuple[int, int, int]]
CONTEXTS = 16
"""Of the coded form: whether the neighbours to the left, above and above to the right are in, and the base's token."""


def encode_set(mask: Mask, grids: Grids, base: Mask | None = None, handle: int = 0) -> PositionSet:
    """The message for ``mask`` (bool ``[tokens]``), or, with a ``base`` that both ends hold, for what changed since.

    ``grids`` are the (frames, rows, columns) of the pictures in tokens, so that neighbours in a picture tell of each
    other; without them a token's neighbour is the one before it. The form takes at most ``tokens / 8`` bytes, rounded
    up, the message 2 bytes more (3 from 1,024 tokens on), and up to 6 for the ``handle``.
    """
    forms = set_forms(mask, grids, base)
    smallest = min(forms, key=lambda form: len(forms[form]))
    message = PositionSet(base=handle if base is not None else 0)
    setattr(message, smallest, forms[smallest])
    return message


def set_forms(mask: Mask, grids: Grids, base: Mask | None = None) -> dict[str, bytes]:
    """The same set in every form there is, by the names of :class:`PositionSet`'s fields."""
    known = np.zeros_like(mask) if base is None else base
    changed = mask ^ known
    edges = np.flatnonzero(np.diff(changed, prepend=False, append=False))
    bits = changed.astype(int).tolist()
    return {
        "bitmap": np.packbits(changed, bitorder="little").tobytes(),
        "runs": write_varints(np.diff(edges, prepend=0)),
        "coded": encode_bits(bits, _contexts(bits, known, grids), Weights(CONTEXTS)),
    }


def decode_set(message: PositionSet, tokens: int, grids: Grids, base: Mask | None = None) -> Mask:
    """The set back, bool ``[tokens]``.

    Raises
    ------
    CorruptError
        It does not fit the number of tokens, or is no set at all.
    """
    if base is not None and len(base) != tokens:
        raise CorruptError(f"changes to a set of {len(base)} visual tokens, where this prompt has {tokens}; ask anew")
    form = message.WhichOneof("form")
    known = np.zeros(tokens, dtype=np.bool_) if base is None else base
    if form == "bitmap":
        changed = _from_bitmap(message.bitmap, tokens)
    elif form == "runs":
        changed = _from_runs(read_varints(message.runs, tokens), tokens)
    elif form == "coded":
        changed = _from_coded(message.coded, known, grids)
    else:
        raise CorruptError("a set of positions without a form; update kvferry")
    mask: Mask = changed ^ known
    return mask


def _from_bitmap(data: bytes, tokens: int) -> Mask:
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little").astype(np.bool_)
    if len(data) != -(-tokens // 8) or bits[tokens:].any():
        raise CorruptError(f"a bitmap of {len(data)} bytes for {tokens} tokens")
    return bits[:tokens]


def _from_runs(runs: npt.NDArray[np.int64], tokens: int) -> Mask:
    edges = np.cumsum(runs)
    if len(runs) % 2 or (len(runs) and int(edges[-1]) > tokens) or (runs[1:] == 0).any():
        raise CorruptError(f"runs that do not fit {tokens} tokens")
    mask = np.zeros(tokens, dtype=np.bool_)
    for begin, end in edges.reshape(-1, 2).tolist():
        mask[begin:end] = True
    return mask


def _from_coded(data: bytes, known: Mask, grids: Grids) -> Mask:
    if len(data) > len(known):
        raise CorruptError(f"{len(data)} bytes for a set of {len(known)} tokens")
    reader = BitReader(data, Weights(CONTEXTS))
    bits = [0] * len(known)
    for index, context in enumerate(_contexts(bits, known, grids)):
        bits[index] = reader.read(context)
    reader.finish()
    return np.array(bits, dtype=np.bool_)


def _contexts(bits: list[int], known: Mask, grids: Grids) -> Iterator[int]:
    """The context of each token in turn; looks only at those before it."""
    base = known.astype(int).tolist()
    for index, (left, above, right) in enumerate(_neighbours(len(bits), grids)):
        before = (bits[i] if i >= 0 else 0 for i in (left, above, right))
        yield 8 * base[index] + sum(bit << place for place, bit in enumerate(before))


def _neighbours(tokens: int, grids: Grids) -> Iterator[tuple[int, int, int]]:
    """For each token those to the left, above, and above to the right; -1 where there is none."""
    if sum(frames * rows * columns for frames, rows, columns in grids) != tokens:
        grids = [(1, 1, tokens)]
    first = 0
    for frames, rows, columns in grids:
        for index in range(frames * rows * columns):
            row, column = divmod(index, columns)
            here = first + index
            yield (
                here - 1 if column else -1,
                here - columns if row % rows else -1,
                here - columns + 1 if row % rows and column + 1 < columns else -1,
            )
        first += frames * rows * columns
