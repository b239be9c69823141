"""A row of :meth:`kvferry.bitstream.contexts.Contexts.decode`, compiled by numba: the same decisions.

Only that module imports this one, where the package numba is installed.
"""

from __future__ import annotations

from typing import Any

from numba import int64, uint8, void

from kvferry.bitstream.binary import FULL, HALVE, LOW, STEP
from kvferry.codecs.jit import kernel, read, written

_ROW = written(int64, 1), read(int64, 1), read(uint8, 1), written(uint8, 1)


@kernel(void(read(uint8, 1), written(int64, 1), written(int64, 1), *_ROW))
def decide(data: Any, state: Any, ones: Any, zeros: Any, fixed: Any, closed: Any, out: Any) -> None:
    """``state`` is code, span and bytes read; ``fixed`` the part of the contexts that does not depend on ``out``."""
    code, span, octets = state[0], state[1], state[2]
    bit = 0
    for place in range(len(out)):
        if closed[place]:
            bit = 0
            out[place] = 0
            continue
        context = fixed[place] + 2 * bit
        part = span // (ones[context] + zeros[context]) * ones[context]
        bit = 1 if code < part else 0
        out[place] = bit
        if bit:
            ones[context] += STEP
            span = part
        else:
            zeros[context] += STEP
            code -= part
            span -= part
        if ones[context] + zeros[context] > HALVE:
            ones[context] = (ones[context] + 1) // 2
            zeros[context] = (zeros[context] + 1) // 2
        while span < LOW:
            code = code << 8
            if octets < len(data):
                code = code | data[octets]
            span = span << 8
            octets += 1
    state[0], state[1], state[2] = code, span, octets


def start(data: Any) -> list[int]:
    """The state before the first decision."""
    return [int.from_bytes(bytes(data[:4]).ljust(4, b"\0")), FULL, 4]
