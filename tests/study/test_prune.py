"""Pruned prefills and what they are set against: as many tokens, as much work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kvferry.models import load
from study.long_runs import Plan
from study.page import Places
from study.prune import AFTER, BEFORE, FLOOR, FULL, SETTINGS, before, beside, fact, name, render, run

Record = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def record() -> Record:
    found: Record = run(load("testbed/cloud", dtype="float32"), Plan("prune", n=1), 0)
    return found


def test_rows_are_set_against_their_like(record: Record) -> None:
    size, work = record["bytes"], record["work"]
    for layer, fraction in SETTINGS:
        row = name(layer, fraction)
        for scorer in AFTER:
            assert size[beside(row, scorer)] == pytest.approx(size[row], rel=0.03)
            assert work[beside(row, scorer)] == 1
        assert size[name(layer, fraction, "last")] == pytest.approx(size[row], rel=0.03)
        early = work[beside(row, "early")]
        assert work[row] - 0.02 < early <= work[row] < 1
    for fraction in BEFORE:
        row = before(fraction)
        assert 0 < work[row] < 1
        for scorer in AFTER:
            assert size[beside(row, scorer)] == pytest.approx(size[row], rel=0.05)
            assert work[beside(row, scorer)] == 1
    assert work[before(0.25)] < work[before(0.5)]
    assert size[FLOOR] < min(size[name(*setting)] for setting in SETTINGS) < size[FULL]
    assert set(record["right"]) == set(size) == set(work)


def test_a_section_says_what_was_found(record: Record, tmp_path: Path) -> None:
    file = tmp_path / "prune-cloud.jsonl"
    head = {"plan": {"split": "test"}, "command": "python -m study prune"}
    rows = [{"index": i, **record} for i in range(40)]
    row = name(2, 0.1)
    right = np.zeros(40, int)
    right[:30] = 1
    lines = [head]
    for i, each in enumerate(rows):
        lines.append({**each, "right": {x: int(right[i]) if x == row else 1 for x in record["right"]}})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = render(file, Places(tmp_path / "a.md", tmp_path, tmp_path), "Dropped inside")
    assert text.startswith("## Dropped inside\n\nProtocol A, n = 40 questions of the test split")
    (worse,) = [line for line in text.splitlines() if line.startswith(f"| {row} | q2c after prefill")]
    assert "-0.250 [-0.375, -0.125] | fewer right |" in worse
    (same,) = [line for line in text.splitlines() if line.startswith(f"| {name(2, 0.25)} | q2c after prefill")]
    assert same.endswith("no difference shown |")
    assert "before the language model" in text
    assert f"| {before(0.25)} | leaveout after prefill" in text
    old = [head]
    old += [{k: {r: x for r, x in v.items() if "tower" not in r} if isinstance(v, dict) else v
             for k, v in line.items()} for line in lines[1:]]  # fmt: skip
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    assert "tower" not in render(tmp_path / "old.jsonl", Places(tmp_path / "a.md", tmp_path, tmp_path), "Old")
    places = Places(tmp_path / "a.md", tmp_path, tmp_path)
    (told,) = fact(tmp_path, places)
    assert "n = 40)" in told
    assert "by the last token, as FastV has it, 100.0 [100.0, 100.0] %" in told
    assert list(fact(tmp_path / "none", places)) == []
