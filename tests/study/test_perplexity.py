"""Perplexity behind a compressed cache: windows, one measurement, and what is told of several."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from kvferry import VLM, InputError
from study import perplexity
from study.page import Places
from study.perplexity import BARE, CONTEXT, FULL, PAGE, RAW, THEN, column, measure, table, windows, write_page
from study.squad.texts import Paragraph

FEW = (FULL, "full|int8", "full|int2", "streaming@0.5|bf16")


def test_windows_share_nothing_and_keep_articles_together() -> None:
    many = [Paragraph(f"t{i % 3}", f"{i % 3} " * 500, ()) for i in range(9)]
    found = list(windows(many, lambda text: [int(x) for x in text.split()]))
    assert len(found) == 9 * 500 // (CONTEXT + THEN)
    together = [x for one in found for x in one]
    assert np.count_nonzero(np.diff(together)) == 2


def test_the_full_cache_foretells_what_the_model_does(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "CONTEXT", 40)
    ids = torch.randint(20, 90, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    found = measure(vlm, ids, FEW)
    assert set(found["rows"]) == {*FEW, BARE}
    with torch.inference_mode():
        logits = vlm.model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    truth = -float(logits[40:-1].gather(1, torch.tensor(ids[41:])[:, None]).mean())
    assert found["rows"][FULL][1] == pytest.approx(truth, abs=5e-3)
    assert found["rows"][FULL][2] == 1.0
    assert found["rows"][FULL][0] > found["rows"]["full|int8"][0] > found["rows"]["full|int2"][0]
    assert abs(found["rows"]["full|int2"][1] - truth) > abs(found["rows"]["full|int8"][1] - truth)
    assert found["rows"][BARE][1] != found["rows"][FULL][1]


def test_the_page(tmp_path: Path) -> None:
    places = Places(tmp_path / "RESULTS.md", tmp_path / "figures", tmp_path / "docs")
    assert write_page(tmp_path, places) == []
    records = [
        {"bf16": 1000, "tokens": CONTEXT, "commit": "c" * 40, "machine": "m",
         "rows": {FULL: [1000, math.log(x), 1.0], "full|int4": [250, math.log(2 * x), 0.5], BARE: [0, math.log(50), 0]}}
        for x in (8, 8, 8)
    ]  # fmt: skip
    (tmp_path / RAW).write_text("".join(json.dumps(x) + "\n" for x in records))
    assert write_page(tmp_path, places) == [(perplexity.TITLE, PAGE.removesuffix(".md"))]
    text = (places.details / PAGE).read_text()
    assert "n = 3 windows" in text
    assert "| `full\\|bf16` (ceiling) | 8.00 [8.00, 8.00] |  | 100.0 | 1.0x |" in text
    assert "| `full\\|int4` | 16.00 [16.00, 16.00] | 2.000 [2.000, 2.000] | 50.0 | 4.0x |" in text
    assert text.splitlines()[-1].startswith("| `nothing` (floor) | 50.00")
    assert column(records, "full|int4", 0).tolist() == [250.0] * 3
    assert table(records) in text
    del records[1]["rows"]["full|int4"]
    (tmp_path / RAW).write_text("".join(json.dumps(x) + "\n" for x in records))
    with pytest.raises(InputError, match="different rows"):
        write_page(tmp_path, places)
