"""Which tokens stay. One method, one file; a new one needs its file and a line in ``SCORERS``."""

from kvferry.selection.base import SINKS, Scorer, Selection, evict, kept_count, top_tokens
from kvferry.selection.full import Full
from kvferry.selection.knorm import KNorm
from kvferry.selection.none import NoVisual
from kvferry.selection.q2c import Q2C
from kvferry.selection.random import Random
from kvferry.selection.snapkv import SnapKV

SCORERS: dict[str, type] = {
    "full": Full,
    "none": NoVisual,
    "q2c": Q2C,
    "snapkv": SnapKV,
    "knorm": KNorm,
    "random": Random,
}

__all__ = ["SCORERS", "SINKS", "Scorer", "Selection", "evict", "kept_count", "top_tokens"]
