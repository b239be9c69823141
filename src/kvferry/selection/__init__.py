"""Which tokens stay. One method, one file; a new one needs its file and a line in its dictionary."""

from kvferry.plugins import Registry
from kvferry.selection.base import SINKS, Scorer, Selection
from kvferry.selection.budgets import BUDGETS, Budget
from kvferry.selection.choose import SCORED, choose, least_count
from kvferry.selection.eviction import evict, kept_count
from kvferry.selection.expected_attention import ExpectedAttention
from kvferry.selection.full import Full
from kvferry.selection.h2o import H2O
from kvferry.selection.keydiff import KeyDiff
from kvferry.selection.knorm import KNorm
from kvferry.selection.leaveout import LeaveOut
from kvferry.selection.merge import MERGES, Merge
from kvferry.selection.modality import POLICIES, Policy
from kvferry.selection.none import NoVisual
from kvferry.selection.q2c import Q2C
from kvferry.selection.random import Random
from kvferry.selection.snapkv import SnapKV
from kvferry.selection.streaming import Streaming
from kvferry.selection.tiers import Importance, Order, in_tiers
from kvferry.selection.value_norm import ValueNorm
from kvferry.selection.vlcache import VLCache

SCORERS: dict[str, type] = Registry(
    "scorers",
    {
        "full": Full,
        "none": NoVisual,
        "q2c": Q2C,
        "snapkv": SnapKV,
        "h2o": H2O,
        "vlcache": VLCache,
        "leaveout": LeaveOut,
        "streaming": Streaming,
        "random": Random,
        "knorm": KNorm,
        "keydiff": KeyDiff,
        "value_norm": ValueNorm,
        "expected_attention": ExpectedAttention,
    },
)

__all__ = [
    "BUDGETS", "MERGES", "POLICIES", "SCORED", "SCORERS", "SINKS", "Budget", "Importance", "Merge", "Order", "Policy",
    "Scorer", "Selection", "choose", "evict", "in_tiers", "kept_count", "least_count",
]  # fmt: skip
