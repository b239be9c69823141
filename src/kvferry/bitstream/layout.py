"""The prompt's layout in few bytes: runs instead of tokens, and positions that are rebuilt instead of sent."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from kvferry.cache import Modality, PromptLayout, Role
from kvferry.errors import CorruptError
from kvferry.wire.bitstream_pb2 import Grid, Layout, Segment

MAX_TOKENS = 1 << 22
_INT32 = np.iinfo(np.int32)
Positions = npt.NDArray[np.int32]


def encode(layout: PromptLayout) -> Layout:
    """The message; :func:`decode` of it gives an equal layout."""
    message = Layout(rope_delta=layout.rope_delta, axes=layout.positions.shape[0])
    message.grids.extend(Grid(frames=f, rows=r, columns=c) for f, r, c in layout.grids)
    kinds = layout.modality.astype(np.int64) + 4 * layout.role.astype(np.int64)
    for start, stop in _runs(kinds):
        segment = Segment(count=stop - start, kind=int(kinds[start]))
        tokens = layout.token_ids[start:stop]
        if len(tokens) > 2 and (tokens == tokens[0]).all():
            segment.fill = int(tokens[0])
        else:
            message.token_ids.extend(tokens.tolist())
        message.segments.append(segment)
    rebuilt = follow(layout.modality, layout.grids, layout.positions.shape[0])
    if rebuilt is None or not np.array_equal(rebuilt, layout.positions):
        steps: list[int] = np.diff(layout.positions, prepend=0).reshape(-1).tolist()
        message.positions.extend(steps)
    return message


def decode(message: Layout) -> PromptLayout:
    """The layout, or :class:`CorruptError`; nothing larger than :data:`MAX_TOKENS` tokens is ever allocated."""
    counts = [segment.count for segment in message.segments]
    n = sum(counts)
    if not 0 < n <= MAX_TOKENS or 0 in counts:
        raise CorruptError(f"a prompt of {n} tokens (possible are 1 to {MAX_TOKENS})")
    kinds = np.array([segment.kind for segment in message.segments], np.int64)
    modality, role = kinds % 4, kinds // 4
    if modality.max() > max(Modality) or role.max() > max(Role):
        raise CorruptError("a segment of the prompt is of an unknown modality or role")
    if message.axes not in (1, 3):
        raise CorruptError(f"{message.axes} rotary axes (possible are 1 and 3)")
    tokens = _tokens(message, n)
    grids = tuple((grid.frames, grid.rows, grid.columns) for grid in message.grids)
    wide = np.repeat(modality, counts).astype(np.uint8)
    positions = _explicit(message, n) if message.positions else follow(wide, grids, message.axes)
    if positions is None:
        raise CorruptError("the pictures' grids do not fit the prompt's visual tokens")
    return PromptLayout(
        token_ids=tokens,
        modality=wide,
        role=np.repeat(role, counts).astype(np.uint8),
        positions=positions,
        rope_delta=message.rope_delta,
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


def _runs(values: npt.NDArray[np.generic]) -> list[tuple[int, int]]:
    """Start and stop of every run of equal values."""
    edges = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    return list(pairwise(edges))


def _tokens(message: Layout, n: int) -> npt.NDArray[np.int32]:
    written = np.array(message.token_ids, np.int64)
    tokens = np.empty(n, np.int64)
    start = used = 0
    for segment in message.segments:
        stop = start + segment.count
        if segment.HasField("fill"):
            tokens[start:stop] = segment.fill
        else:
            if used + segment.count > len(written):
                raise CorruptError("the prompt has fewer tokens than its segments say")
            tokens[start:stop] = written[used : used + segment.count]
            used += segment.count
        start = stop
    if used != len(written) or int(tokens.max()) > _INT32.max:
        raise CorruptError("the prompt's tokens do not fit its segments")
    return tokens.astype(np.int32)


def _explicit(message: Layout, n: int) -> Positions:
    if len(message.positions) != message.axes * n:
        raise CorruptError(f"{len(message.positions)} rotary positions for {message.axes} x {n}")
    positions = np.cumsum(np.array(message.positions, np.int64).reshape(message.axes, n), axis=1)
    if int(positions.min()) < _INT32.min or int(positions.max()) > _INT32.max:
        raise CorruptError("a rotary position is out of range")
    return positions.astype(np.int32)
