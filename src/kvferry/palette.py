"""One colour and one mark for each method, the same in every figure.

Colours are Okabe and Ito's, which all eyes tell apart (without their yellow, which is too faint on white), and a few
darker ones beside them.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Look(NamedTuple):
    """How a method is drawn."""

    colour: str
    marker: str


INK = "#222222"
"""For text, ceilings, and what is sent instead of a cache."""
QUIET = "#9e9e9e"
"""For baselines and for what is only drawn for comparison."""
PALE = "#F0C9A8"
"""A light form of the accent: of the same kind, but worse."""
ACCENT = "#D55E00"
"""For what a figure is about."""

SCORERS = {
    "leaveout": Look("#D55E00", "D"),
    "vlcache": Look("#0072B2", "o"),
    "snapkv": Look("#009E73", "s"),
    "h2o": Look("#E69F00", "^"),
    "q2c": Look("#CC79A7", "v"),
    "expected_attention": Look("#56B4E9", "P"),
    "keydiff": Look("#8C6A2F", "X"),
    "knorm": Look("#6A3D9A", "p"),
    "value_norm": Look("#7A7A00", "*"),
    "streaming": Look("#4D8B8B", "h"),
    "random": Look(QUIET, "."),
}
CODECS = {
    "transform": Look("#D55E00", "D"),
    "int": Look("#0072B2", "o"),
    "turbo": Look("#009E73", "s"),
    "kivi": Look("#E69F00", "^"),
    "svd": Look("#CC79A7", "v"),
    "kvtc": Look("#56B4E9", "P"),
    "delta": Look("#8C6A2F", "X"),
    "mixed": Look("#6A3D9A", "p"),
    "apart": Look("#7A7A00", "*"),
    "fp8": Look("#4D8B8B", "h"),
    "capsule": Look("#B15928", "<"),
    "JPEG": Look(INK, "x"),
    "embeds": Look("#777777", "+"),
}
POLICIES = {
    "risk-aware": Look(ACCENT, "D"),
    "greedy": Look("#0072B2", "o"),
    "oracle": Look(INK, ""),
}
_OTHERS = ("#A6761D", "#1B9E77", "#7570B3", "#E7298A", "#66A61E")


def scorer_look(name: str) -> Look:
    """Of a selection such as ``leaveout@0.1,budget=shared``; methods from outside get a colour by their name."""
    return _look(SCORERS, name.partition("@")[0].partition(",")[0])


def codec_look(name: str) -> Look:
    """Of a codec's text such as ``transform:64`` or ``int4``, or of ``JPEG`` and ``embeds``."""
    codec = re.split(r"[:,|]", name)[0]
    return CODECS.get(codec) or _look(CODECS, codec.rstrip("0123456789B."))


def policy_look(name: str) -> Look:
    """Of a policy; one that always sends the same has the colour of what it sends."""
    if name.startswith("static:"):
        return codec_look(name.rpartition("|")[2])
    return _look(POLICIES, name)


def _look(known: dict[str, Look], name: str) -> Look:
    return known.get(name) or Look(_OTHERS[sum(name.encode()) % len(_OTHERS)], "d")
