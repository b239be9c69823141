"""Where did the bytes go?"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kvferry.bitstream.reader import FrameSize, Reader
from kvferry.cache import Modality
from kvferry.errors import TruncatedError
from kvferry.summary import Summary, summarise_cache


@dataclass(frozen=True)
class Report:
    """What a stream holds and what each part of it costs; ``dtype`` is what the sender held.

    ``header_bytes + trailer_bytes + sum(frame.total) == total_bytes``. ``ratio`` is the full BF16 cache over
    ``total_bytes``.
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

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, the sums included."""
        sums = ("ratio", "payload_bytes", "position_bytes", "overhead_bytes")
        return asdict(self) | {name: getattr(self, name) for name in sums}


def inspect(blob: bytes) -> Report:
    """Read a whole stream and say what is in it; raises as :meth:`Reader.feed` and :meth:`Reader.cache` do."""
    reader = Reader()
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
        dtype=", ".join(sorted({str(shape.dtype).removeprefix("torch.") for shape in header.shapes})),
        frames=frames,
        header_bytes=reader.header_bytes,
        trailer_bytes=len(blob) - reader.header_bytes - sum(frame.total for frame in frames),
        total_bytes=len(blob),
        full_bf16_bytes=header.full_bf16_bytes,
        kept=summarise_cache(reader.cache()),
    )
