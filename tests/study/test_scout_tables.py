"""Claims 11 and 12 from made-up trials: figures by hand, and verdicts that come out both ways."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry import InputError
from study.page import Places
from study.scout import Found, ScoutLine, Trial
from study.scout_rows import Scouted, elias_fano_bytes
from study.scout_tables import FAILS, HOLDS, OPEN, claim_overlap, claim_ratio, claim_share, claims, render

TRIAL = Trial("here/small", "here/large", ("q2c",), (0.75, 0.5, 0.25), n=100)
TOKENS = 200
KEPT = (150, 100, 50)


def scouted(shares: tuple[float, ...] = (0.83, 0.66, 0.5), lost: int = 0, cache: int = 300_000) -> Scouted:
    """The overlap at each fraction, ``lost`` of 100 answers fewer from the edge's choice, and the cache's bytes."""
    lines = [
        ScoutLine(
            i, "colour", TOKENS, cache, 14_000, full=1, none=0, alone=int(i < 80), random=[1, 1, int(i < 50)],
            found=[
                Found(round(share * kept) + i % 2, 1, int(i >= lost), 30, 40, 21)
                for share, kept in zip(shares, KEPT, strict=True)
            ],
        )
        for i in range(100)
    ]  # fmt: skip
    return Scouted(head(), lines)


def head() -> dict[str, object]:
    return {
        "scout": asdict(TRIAL), "command": "python -m study scout-overlap --n 100", "commit": "1" * 40, "torch": "2",
        "transformers": "5", "machine": "a machine", "dtype": "bfloat16", "fingerprint": "f" * 32,
        "edge_fingerprint": "e" * 32,
    }  # fmt: skip


def test_figures_by_hand() -> None:
    found = scouted(lost=10)
    assert found.overlap("q2c@0.5").mean == pytest.approx(0.665)
    assert found.chance("q2c@0.5").mean == pytest.approx(0.5)
    assert found.jaccard("q2c@0.25").mean == pytest.approx(np.mean([25 / 75, 26 / 74]))
    assert found.accuracy("q2c@0.25 random").mean == pytest.approx(0.5)
    assert found.accuracy("q2c@0.75 random").mean == 1
    assert found.share("q2c@0.5 edge", "q2c@0.5 own").mean == pytest.approx(0.9)
    assert found.compare("q2c@0.5 edge", "alone").difference.mean == pytest.approx(0.1)
    assert found.compare("q2c@0.5 edge", "q2c@0.5 own").p == pytest.approx(2 * 0.5**10)
    assert found.shrink("q2c@0.5").mean == pytest.approx(10_000)
    assert found.shrink("q2c@0.5", "16-bit list").mean == pytest.approx(1_500)
    assert found.bytes_as("q2c@0.5", "bitmap").tolist() == [25] * 100
    assert found.within("q2c@0.5", framed=False) == 1
    assert found.within("q2c@0.5", framed=True) == 0


@given(st.integers(1, 5000), st.data())
def test_elias_fano_lies_between_the_bound_and_two_bits_more(tokens: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(1, tokens))
    bound = math.log2(math.comb(tokens, kept))
    assert bound / 8 <= elias_fano_bytes(kept, tokens) <= (kept * math.log2(tokens / kept) + 3 * kept) / 8 + 1


@pytest.mark.parametrize(
    ("shares", "verdict", "word"),
    [((0.83, 0.66, 0.5), HOLDS, "inside 64-70"), ((0.9, 0.9, 0.9), HOLDS, "above 64-70"),
     ((0.83, 0.55, 0.5), FAILS, "below 64-70")],
)  # fmt: skip
def test_overlap(shares: tuple[float, ...], verdict: str, word: str) -> None:
    said = claim_overlap(scouted(shares), "q2c")
    assert said[0] == verdict
    assert word in said[1]
    assert claim_overlap(scouted(shares), "snapkv") == (OPEN, "")


@pytest.mark.parametrize(("lost", "verdict"), [(0, HOLDS), (2, OPEN), (20, FAILS)])
def test_share_of_the_own_choice(lost: int, verdict: str) -> None:
    said = claim_share(scouted(lost=lost), "q2c")
    assert said[0] == verdict
    assert f"{100 - lost}.0 [" in said[1]


@pytest.mark.parametrize(("cache", "verdict"), [(300_000, FAILS), (1_000_000, HOLDS)])
def test_ratio(cache: int, verdict: str) -> None:
    said = claim_ratio(scouted(cache=cache))
    assert said[0] == verdict
    assert f"{cache / 30:,.0f}x" in said[1]
    assert f"{TOKENS * 57_344 / 30:,.0f}" in said[1]


def test_the_page(tmp_path: Path) -> None:
    found = scouted()
    raw = tmp_path / "scout-edge.jsonl"
    lines = [head(), *(list(asdict(line).values()) for line in found.lines)]
    raw.write_text("\n".join(map(json.dumps, lines)) + "\n")
    places = Places(tmp_path / "RESULTS.md", tmp_path / "figures", tmp_path / "details")
    text = render(raw, places, "Scout")
    for line in claims(found):
        assert line in text
    assert "n = 100 questions" in text
    assert "(ceiling)" in text
    assert "floor" in text
    assert "no difference shown" in text
    assert "`python -m study scout-overlap --n 100`" in text
    assert "(details/scout-edge.md)" in text
    assert "where to look" not in text, "that is said of the shipped models"
    assert "16-bit list" in places.detail(raw).read_text()


def test_an_empty_trial() -> None:
    with pytest.raises(InputError, match="scout-overlap"):
        Scouted(head(), [])
