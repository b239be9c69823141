"""The study of mode translate: its rows, what is compared, and the words about the aim."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import kvferry
from kvferry import InputError
from kvferry.modes.translators import find
from study import translate as engine
from study.page import Places
from study.translate_tables import FULL, Compared, fact, render, verdict


def line(index: int, edge: int, right: int, tiny: int, size: int = 100) -> engine.TranslateLine:
    rows = {engine.ALONE: (edge, 0), engine.SMALL: (edge, 200), "full|bf16": (right, 9000)}
    rows |= {engine.TINY: (tiny, size), engine.NOTHING: (0, 0)}
    errors = [[0.1, 0.2], [0.3, 0.4]] if index % engine.ERRORS_EVERY == 0 else []
    return engine.TranslateLine(index, "colour", 10_000, rows, errors)


def test_tiny_is_the_shipped_preset() -> None:
    presets = json.loads(Path("testbed/edge/presets.json").read_text())["presets"]
    assert presets["tiny"] == engine.TINY


def test_the_share_of_the_gap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The edge is right on 50 of 100, the cloud on 90; the full translation on 80 closes 75 %, tiny on 60 25 %."""
    lines = [line(i, int(i < 50), int(i < 80), int(i < 60)) for i in range(100)]
    monkeypatch.setattr(
        "study.translate_tables._others", lambda raw: {FULL: {i: (float(i < 90), 0.0) for i in range(100)}}
    )
    found = Compared(lines, tmp_path)
    assert found.sent == ["full|bf16", engine.TINY]
    assert found.closed("full|bf16").mean == pytest.approx(0.75)
    assert found.closed(engine.TINY).mean == pytest.approx(0.25)
    assert "**missed**" in verdict(found)
    assert "closes 25.0 [" in verdict(found)
    monkeypatch.setattr(
        "study.translate_tables._others", lambda raw: {FULL: {i: (float(i < 61), 0.0) for i in range(100)}}
    )
    assert "**met**" in verdict(Compared(lines, tmp_path))


def test_one_question_and_the_page(tmp_path: Path) -> None:
    edge, cloud = (kvferry.load(x, dtype="float32") for x in ("testbed/edge", "testbed/cloud"))
    made = find(edge.fingerprint, cloud.fingerprint)
    trial = engine.Trial("testbed/edge", "testbed/cloud", made.digest, n=2)
    out = tmp_path / "translate-edge.jsonl"
    first = list(engine.run(trial, edge, cloud, made, out))
    assert [x.index for x in first] == [0, 1]
    assert list(engine.run(trial, edge, cloud, made, out)) == [], "what is there is not asked again"
    rows = first[0].rows
    assert set(rows) == {engine.ALONE, engine.SMALL, engine.NOTHING, *engine.RECIPES}
    sizes = [rows[x][1] for x in engine.RECIPES]
    assert sizes == sorted(sizes, reverse=True)
    assert rows[engine.TINY][1] < rows[engine.SMALL][1], "the text's keys and values stay at home"
    assert np.array(first[0].errors).shape == (6, 2)
    assert 0 < np.array(first[0].errors).max() < 0.5
    with pytest.raises(InputError, match="another trial"):
        list(engine.run(engine.Trial("testbed/edge", "testbed/cloud", "other", n=2), edge, cloud, made, out))
    for name in ("scout-edge.jsonl", "codecs-cloud.jsonl"):
        (tmp_path / name).symlink_to((Path("study/results") / name).absolute())
    text = render(out, Places(tmp_path / "R.md", tmp_path, tmp_path), "Title")
    for words in ("## Title", "n = 2 questions", "`translate:full\\|bf16`", "scout:vlcache@0.25", "image:30", "layer"):
        assert words in text
    places = Places(tmp_path / "R.md", tmp_path, tmp_path)
    (told,) = fact(tmp_path, places)
    assert "n = 2)" in told
    assert "[More](translate-edge.md)" in told
    assert list(fact(tmp_path / "none", places)) == []
