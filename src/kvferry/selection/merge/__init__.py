"""What becomes of evicted tokens. One method, one file; a new one needs a line in ``MERGES``."""

from __future__ import annotations

from typing import Protocol

from kvferry.cache import KVCache, LayerCache
from kvferry.plugins import Registry
from kvferry.selection.merge.lookm import LookM


class Merge(Protocol):
    """Puts what a selection evicted into what it kept; a frozen dataclass."""

    def merge(self, before: KVCache, after: KVCache) -> tuple[LayerCache, ...]:
        """The layers of ``after``, which holds some of the tokens of ``before``; positions stay as they are."""
        ...


MERGES: dict[str, type[Merge]] = Registry("merges", {"lookm": LookM})

__all__ = ["MERGES", "LookM", "Merge"]
