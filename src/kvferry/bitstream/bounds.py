"""What a reader takes from a stream: numbers that are checked before memory is taken for what they announce."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvferry.bounds import MAX_TOKENS, ModelBounds
from kvferry.errors import CorruptError

if TYPE_CHECKING:
    from kvferry.bitstream.header import Header

MAX_CACHE = 1 << 32
MAX_HEADER = 1 << 24
MAX_LAYERS = 4096
_HEADER_BASE = 1 << 16
_HEADER_TOKEN = 24
"""Bytes of a header that a token can take: its id, positions on three axes, and a segment of its own."""

Reserve = Callable[[int], None]
"""Told how many bytes are about to be taken, before they are; what it raises ends the reading."""


def no_reserve(nbytes: int) -> None:
    """For whoever keeps no account."""


@dataclass(frozen=True)
class Bounds:
    """What a stream may announce, whoever wrote it.

    Parameters
    ----------
    cache_bytes : int
        Of the full cache in BF16.
    tokens : int
        Of the prompt.
    model : ModelBounds, optional
        The one model that the cache is for.
    """

    cache_bytes: int = MAX_CACHE
    tokens: int = MAX_TOKENS
    model: ModelBounds | None = None

    @property
    def header_bytes(self) -> int:
        """Of a header, compressed or not."""
        return min(MAX_HEADER, _HEADER_BASE + _HEADER_TOKEN * self.tokens)

    @property
    def header_fields(self) -> int:
        """Fields of a header, with those of its layers; equal neighbours stand once."""
        return 64 + 6 * (len(self.model.shapes) if self.model else MAX_LAYERS)

    def check(self, header: Header) -> None:
        """Refuse what is larger, or not of the model.

        Raises
        ------
        CorruptError, FingerprintError
        """
        if header.full_bf16_bytes > self.cache_bytes:
            raise CorruptError(
                f"the full cache would be {header.full_bf16_bytes} bytes; this reader takes {self.cache_bytes} "
                "(raise max_bytes if that is right)"
            )
        if self.model is not None:
            shapes = [(x.kv_heads, dim) for x in header.shapes for dim in (x.key_dim, x.value_dim)]
            self.model.check(header.fingerprint, shapes, header.layout, header.length)
