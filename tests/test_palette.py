"""Colours: one a method, told apart, whatever a recipe's options are."""

from __future__ import annotations

from itertools import combinations

from kvferry.codecs import CODECS as CODEC_NAMES
from kvferry.palette import CODECS, POLICIES, SCORERS, codec_look, policy_look, scorer_look
from kvferry.selection import SCORERS as SCORER_NAMES


def test_every_method_has_a_colour_of_its_own() -> None:
    for looks in (SCORERS, CODECS):
        assert len({x.colour for x in looks.values()}) == len({x.marker for x in looks.values()}) == len(looks)
        channels = [tuple(int(x.colour[i : i + 2], 16) for i in (1, 3, 5)) for x in looks.values()]
        assert min(sum(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in combinations(channels, 2)) >= 60
    assert set(SCORER_NAMES) - {"full", "none"} == set(SCORERS)
    assert {name.rstrip("0123456789") for name in CODEC_NAMES} - {"bf", "fp"} <= set(CODECS)


def test_options_do_not_change_it() -> None:
    assert scorer_look("leaveout@0.1,budget=shared") == SCORERS["leaveout"]
    assert codec_look("transform:64") == CODECS["transform"]
    assert codec_look("int4|zstd") == codec_look("int3,coder=range") == codec_look("intB") == CODECS["int"]
    assert codec_look("fp8") == CODECS["fp8"]
    assert codec_look("mine:2") == codec_look("mine:4")
    assert policy_look("static:kv:full|int4") == codec_look("int4")
    assert policy_look("greedy") == POLICIES["greedy"]
