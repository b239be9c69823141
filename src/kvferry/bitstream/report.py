"""Where did the bytes go?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from google.protobuf.message import Message

from kvferry.bitstream.bounds import MAX_HEADER, Bounds
from kvferry.bitstream.frame_size import FrameSize
from kvferry.bitstream.reader import Reader
from kvferry.bitstream.records import START, Kind, decompress, parse, read_prefix
from kvferry.cache import Modality
from kvferry.errors import TruncatedError
from kvferry.summary import Summary, summarise
from kvferry.wire import bitstream_pb2 as pb

_SUMMED = ("entries", "visual", "position_bytes", "payload_bytes", "unpacked_bytes", "overhead_bytes", "total")


@dataclass(frozen=True)
class Share:
    """What some frames hold and cost together; the fields are those of :class:`FrameSize`."""

    frames: int
    entries: int
    visual: int
    position_bytes: int
    payload_bytes: int
    unpacked_bytes: int
    overhead_bytes: int
    total: int


def share_of(frames: Iterable[FrameSize]) -> Share:
    """The sums over ``frames``."""
    some = list(frames)
    return Share(len(some), **{name: sum(getattr(frame, name) for frame in some) for name in _SUMMED})


@dataclass(frozen=True)
class Report:
    """What a stream holds and what each part of it costs; ``dtype`` is what the sender held.

    ``header_bytes + trailer_bytes + sum(frame.total) == total_bytes``; records that a reader ignores count as trailer.
    ``header`` says what each field takes of ``header_bytes``, by its name in the schema; ``framing`` is the rest, and
    ``zstd``, below zero, what compression saved. ``ratio`` is the full BF16 cache over ``total_bytes``.
    """

    recipe: str
    model_name: str
    fingerprint: str
    tokens: int
    visual_tokens: int
    length: int
    grids: tuple[tuple[int, int, int], ...]
    layers: int
    dtype: str
    tiers: int
    header: dict[str, int]
    frames: tuple[FrameSize, ...]
    header_bytes: int
    trailer_bytes: int
    total_bytes: int
    full_bf16_bytes: int
    kept: Summary

    @property
    def ratio(self) -> float:
        """How many times smaller than the full cache in BF16."""
        return self.full_bf16_bytes / self.total_bytes

    @property
    def payload_bytes(self) -> int:
        """Keys and values, scales included."""
        return sum(frame.payload_bytes for frame in self.frames)

    @property
    def position_bytes(self) -> int:
        """Which tokens were kept."""
        return sum(frame.position_bytes for frame in self.frames)

    @property
    def overhead_bytes(self) -> int:
        """Everything but the payloads."""
        return self.total_bytes - self.payload_bytes

    @property
    def by_layer(self) -> dict[int, Share]:
        """What each layer holds and costs."""
        return {i: share_of(x for x in self.frames if x.layer == i) for i in range(self.layers)}

    @property
    def by_tier(self) -> dict[int, Share]:
        """What the first frames of all layers hold and cost, what the second, ..."""
        return {i: share_of(x for x in self.frames if x.tier == i) for i in sorted({x.tier for x in self.frames})}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the sums included."""
        sums = ("ratio", "payload_bytes", "position_bytes", "overhead_bytes")
        shares = {
            "by_layer": [asdict(share) for share in self.by_layer.values()],
            "by_tier": [asdict(share) for share in self.by_tier.values()],
        }
        return asdict(self) | {name: getattr(self, name) for name in sums} | shares


def inspect(blob: bytes, *, decode: bool = False) -> Report:
    """Say what is in a whole stream, by its header and the positions in it; no keys and values are decoded.

    Parameters
    ----------
    decode : bool
        Decode them after all, so that whatever a reader would refuse is refused; needs PyTorch, and the profile that
        the stream names.

    Raises
    ------
    BitstreamError
        As :meth:`Reader.feed` and :meth:`Reader.positions`; checksums are always checked.
    """
    reader = Reader(decode=decode)
    reader.feed(blob)
    if not reader.complete or reader.header is None:
        raise TruncatedError(f"the stream ends after {len(blob)} bytes, before its trailer; have it sent again")
    header, frames = reader.header, tuple(reader.frames)
    return Report(
        recipe=header.recipe,
        model_name=header.model_name,
        fingerprint=header.fingerprint,
        tokens=len(header.layout),
        visual_tokens=int((header.layout.modality != Modality.TEXT).sum()),
        length=header.length,
        grids=header.layout.grids,
        layers=len(header.shapes),
        dtype=", ".join(sorted({shape.dtype for shape in header.shapes})),
        tiers=header.tiers,
        header=_header_parts(blob, reader.header_bytes),
        frames=frames,
        header_bytes=reader.header_bytes,
        trailer_bytes=len(blob) - reader.header_bytes - sum(frame.total for frame in frames),
        total_bytes=len(blob),
        full_bf16_bytes=header.full_bf16_bytes,
        kept=summarise(reader.positions(), header.layout, header.length),
    )


def _header_parts(blob: bytes, size: int) -> dict[str, int]:
    """Bytes of each field of the header, those of the layout apart, of ``size`` in all; ``blob`` was read before."""
    prefix = read_prefix(blob, len(START))
    if prefix is None:
        raise TruncatedError("the stream ends before its header; have it sent again")
    packed = blob[prefix.body : prefix.body + prefix.size]
    body = decompress(packed, MAX_HEADER) if prefix.kind == Kind.HEADER_ZSTD else packed
    message = parse(pb.Header, body, Bounds().header_fields)
    parts = _field_sizes(message)
    inner = _field_sizes(message.layout)
    parts["layout"] -= sum(inner.values())
    parts |= {f"layout.{name}": bytes_ for name, bytes_ in inner.items()}
    if len(packed) != len(body):
        parts["zstd"] = len(packed) - len(body)
    return {"framing": size - sum(parts.values())} | parts


def _field_sizes(message: Message) -> dict[str, int]:
    sizes = {}
    for field, _ in message.ListFields():
        without = type(message)()
        without.CopyFrom(message)
        without.ClearField(field.name)
        sizes[field.name] = message.ByteSize() - without.ByteSize()
    return sizes
