"""The prompt's layout in few bytes: runs instead of tokens, and positions that are rebuilt instead of sent."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.bounds import MAX_TOKENS
from kvferry.cache import Modality, PromptLayout, Role
from kvferry.errors import CorruptError
from kvferry.wire.bitstream_pb2 import Layout

MAX_SEGMENTS = 1 << 16
MAX_GRIDS = 1 << 12
_INT32 = np.iinfo(np.int32)
Positions = npt.NDArray[np.int32]


def encode(layout: PromptLayout) -> Layout:
    """The message; :func:`decode` of it gives an equal layout."""
    axes = layout.positions.shape[0]
    message = Layout(axes=axes if axes > 1 else 0)
    message.grids.extend(number for grid in layout.grids for number in grid)
    kinds = layout.modality.astype(np.int64) + 4 * layout.role.astype(np.int64)
    for start, stop in _runs(kinds):
        tokens = layout.token_ids[start:stop]
        filled = len(tokens) > 2 and bool((tokens == tokens[0]).all())
        message.segments.extend([stop - start, 2 * int(kinds[start]) + filled])
        (message.segments if filled else message.token_ids).extend(tokens[:1].tolist() if filled else tokens.tolist())
    rebuilt = follow(layout.modality, layout.grids, axes)
    if rebuilt is None or not np.array_equal(rebuilt, layout.positions):
        steps: list[int] = np.diff(layout.positions, prepend=0).reshape(-1).tolist()
        message.positions.extend(steps)
    if layout.rope_delta != _delta(layout.positions):
        message.rope_delta = layout.rope_delta
    return message


def decode(message: Layout, most: int = MAX_TOKENS) -> PromptLayout:
    """The layout, or :class:`CorruptError`; nothing larger than ``most`` tokens is ever allocated."""
    if len(message.segments) > 3 * MAX_SEGMENTS or len(message.grids) > 3 * MAX_GRIDS:
        raise CorruptError(f"a prompt of more than {MAX_SEGMENTS} segments, or of more than {MAX_GRIDS} pictures")
    segments = _segments(message)
    counts = [segment.size for segment in segments]
    n = sum(counts)
    if not 0 < n <= most or 0 in counts:
        raise CorruptError(f"a prompt of {n} tokens (possible are 1 to {most})")
    if len(message.token_ids) > n:
        raise CorruptError("the prompt's tokens do not fit its segments")
    kinds = np.array([segment.kind for segment in segments], np.int64)
    modality, role = kinds % 4, kinds // 4
    if modality.max() > max(Modality) or role.max() > max(Role):
        raise CorruptError("a segment of the prompt is of an unknown modality or role")
    axes = message.axes or 1
    if axes not in (1, 3):
        raise CorruptError(f"{axes} rotary axes (possible are 1 and 3)")
    if len(message.grids) % 3:
        raise CorruptError("a picture's grid is cut short")
    frames, rows, columns = (message.grids[start::3] for start in range(3))
    grids = tuple(zip(frames, rows, columns, strict=True))
    wide = np.repeat(modality, counts).astype(np.uint8)
    positions = _explicit(message, axes, n) if message.positions else follow(wide, grids, axes)
    if positions is None:
        raise CorruptError("the pictures' grids do not fit the prompt's visual tokens")
    return PromptLayout(
        token_ids=_tokens(message, segments, n),
        modality=wide,
        role=np.repeat(role, counts).astype(np.uint8),
        positions=positions,
        rope_delta=message.rope_delta if message.HasField("rope_delta") else _delta(positions),
        grids=grids,
    )


def follow(modality: npt.NDArray[np.uint8], grids: tuple[tuple[int, int, int], ...], axes: int) -> Positions | None:
    """Rotary positions ``[axes, n]`` as most models place them, or ``None`` where the grids do not fit.

    One axis counts tokens. Three are Qwen2-VL's M-RoPE (arXiv 2409.12191): text counts on all three; a picture's
    tokens take (frame, row, column) from where the text stopped, and the text goes on after the largest of them.
    """
    n = len(modality)
    if axes == 1:
        return np.arange(n, dtype=np.int32)[None]
    out = np.empty((axes, n), np.int32)
    remaining = iter(grids)
    place = 0
    visual = modality != Modality.TEXT
    for start, stop in _runs(visual):
        if not visual[start]:
            out[:, start:stop] = place + np.arange(stop - start)
            place += stop - start
            continue
        while start < stop:
            grid = next(remaining, None)
            if grid is None or not 0 < grid[0] * grid[1] * grid[2] <= stop - start:
                return None
            size = grid[0] * grid[1] * grid[2]
            out[:, start : start + size] = place + np.indices(grid).reshape(3, size)
            place += max(grid)
            start += size
    return out


class _Segment(NamedTuple):
    size: int
    kind: int
    fill: int | None


def _segments(message: Layout) -> list[_Segment]:
    numbers = iter(message.segments)
    segments = []
    try:
        for size in numbers:
            kind, filled = divmod(next(numbers), 2)
            segments.append(_Segment(size, kind, next(numbers) if filled else None))
    except StopIteration:
        raise CorruptError("a segment of the prompt is cut short") from None
    return segments


def _delta(positions: Positions) -> int:
    """From a prompt's length to the position after its largest."""
    length: int = positions.shape[1]
    return int(positions.max()) + 1 - length


def _runs(values: npt.NDArray[np.generic]) -> list[tuple[int, int]]:
    """Start and stop of every run of equal values."""
    edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return list(pairwise(edges))


def _tokens(message: Layout, segments: list[_Segment], n: int) -> npt.NDArray[np.int32]:
    written = np.array(message.token_ids, np.int64)
    tokens = np.empty(n, np.int64)
    start = used = 0
    for segment in segments:
        stop = start + segment.size
        if segment.fill is not None:
            tokens[start:stop] = segment.fill
        else:
            if used + segment.size > len(written):
                raise CorruptError("the prompt has fewer tokens than its segments say")
            tokens[start:stop] = written[used : used + segment.size]
            used += segment.size
        start = stop
    if used != len(written) or int(tokens.max()) > _INT32.max:
        raise CorruptError("the prompt's tokens do not fit its segments")
    return tokens.astype(np.int32)


def _explicit(message: Layout, axes: int, n: int) -> Positions:
    if len(message.positions) != axes * n:
        raise CorruptError(f"{len(message.positions)} rotary positions for {axes} x {n}")
    positions = np.cumsum(np.array(message.positions, np.int64).reshape(axes, n), axis=1)
    if int(positions.min()) < _INT32.min or int(positions.max()) > _INT32.max:
        raise CorruptError("a rotary position is out of range")
    return positions.astype(np.int32)
