"""Where the bytes of one frame went."""

from __future__ import annotations

from dataclasses import dataclass

from kvferry.bitstream.header import Header
from kvferry.bitstream.positions import Kept
from kvferry.wire import bitstream_pb2 as pb


@dataclass(frozen=True)
class FrameSize:
    """Where the bytes of one frame went; ``overhead_bytes`` is everything but positions and payload.

    ``tier`` counts the frames of the layer. ``kept`` is per head, and the mean, rounded down, where heads keep
    differently many: ``counts`` then says how many each. ``visual`` of the ``entries``, which are all heads' tokens,
    are visual. ``rows`` is 1 where all heads keep the same tokens; ``form`` is how the positions are written;
    ``unpacked_bytes`` is the payload's size before the lossless stage. ``layers`` from ``layer`` on are in the frame.
    """

    layer: int
    tier: int
    kept: int
    entries: int
    visual: int
    rows: int
    form: str
    position_bytes: int
    payload_bytes: int
    unpacked_bytes: int
    overhead_bytes: int
    counts: tuple[int, ...] = ()
    layers: int = 1

    @property
    def total(self) -> int:
        """All bytes of the frame."""
        return self.position_bytes + self.payload_bytes + self.overhead_bytes


def size_of(
    message: pb.Frame, header: Header, layers: range, tier: int, kept: Kept, unpacked: int, size: int
) -> FrameSize:
    form = message.WhichOneof("positions") or "frame"
    where, encoded = 0 if form == "frame" else len(getattr(message, form)), len(message.payload)
    heads = header.shapes[layers[0]].kv_heads
    copies = heads // kept.heads
    every = copies * len(layers)
    visual = header.layout.visual[: header.length]
    return FrameSize(
        layer=layers[0],
        layers=len(layers),
        tier=tier,
        kept=kept.rows.size * copies // heads,
        entries=kept.rows.size * every,
        visual=int(visual[kept.rows].sum()) * every,
        rows=kept.heads,
        form=form,
        position_bytes=where,
        payload_bytes=encoded,
        unpacked_bytes=unpacked,
        overhead_bytes=size - where - encoded,
        counts=kept.counts,
    )
