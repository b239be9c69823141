"""Pages and verdicts of what SmolLM2 answered, from small made-up raw files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from study.claims import smollm2, verdicts
from study.claims.base import FAILS, HOLDS, UNMEASURED, MissingError
from study.claims.page import page, table
from study.page import Places
from study.squad.overview import fact, section, write_pages
from study.squad.plans import PLANS, canonical
from study.squad.records import BARE, FULL, Answer, Record, append, begin

HEAD = {
    "command": "python -m study it", "commit": "c" * 40, "fingerprint": "f", "torch": "2", "machine": "m",
    "dtype": "float32", "parameters": 7,
}  # fmt: skip
N = 40


def put(
    folder: Path,
    name: str,
    right: Mapping[str, int],
    kl: Mapping[str, float],
    sizes: Mapping[str, int],
    n: int = N,
    made: Mapping[str, Any] | None = None,
) -> None:
    """A raw file: of every row how many of 100 answers are right, its KL, its bytes."""
    plan = PLANS[name]
    rows = canonical(plan.rows)
    what = {
        "name": name, "model": "smollm2", "prompt": "completion-4", "tokens": 512, "protocol": plan.protocol,
        "rows": rows, "questions": 4,
    }  # fmt: skip
    begin(folder / f"{name}-512.jsonl", what, HEAD | ({"profiles": made} if made else {}))
    records = []
    for i in range(n):
        outcomes = {FULL: Answer(1000 if plan.carried else None, 0.0, 1.0)}
        for row in rows:
            held = i * 37 % 100 < right.get(row, 50)
            size = sizes.get(row, 300) if plan.carried else None
            outcomes[row] = Answer(size, kl.get(row, 0.2) * (1 + i % 5 / 10), 0.5, None if held else "wrong")
        outcomes[BARE] = Answer(20 if plan.carried else None, 2.0, 0.1, "none")
        records.append(Record(i, plan.protocol, i // 2, "a", ("right",), 500, 499, 1000, "right", outcomes))
    append(folder / f"{name}-512.jsonl", records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "smollm2"
    path.mkdir()
    scores = {"q2c@0.25|bf16": 90, "snapkv@0.25|bf16": 70, "h2o@0.25|bf16": 45, "random@0.25|bf16": 5}
    put(path, "scorers", scores, {"leaveout@0.25|bf16": 0.01}, {})
    put(path, "blind", {}, {}, {})
    mixed, protected = ("full|mixed@study/results/smollm2/" + x for x in ("mixed.json", "protected.json"))
    right = {"full|int8": 100, "full|int4": 98, "full|int3": 93, "full|int2": 15, "q2c@0.75|int4": 97}
    kl = {"full|int8": 0.001, mixed: 0.05, "full|int4": 0.1, protected: 0.09, "full|int3": 0.5, "full|int2": 2.0}
    put(path, "codecs", {**right, mixed: 99, protected: 98}, kl, {"full|int8": 510, "full|int4": 260})
    put(path, "profiles", {}, {}, {}, made={"tree": {"bytes": 2_500_000, "digest": "d", "n": 7}})
    coders = {f"full|svd:{rank}": right for rank, right in ((128, 99), (96, 97), (64, 95), (32, 50), (16, 20))}
    put(path, "coders", coders, {"full|delta:10": 0.4}, {"full|delta:10": 400, "full|delta:0": 250})
    told = {
        "pattern": "distributed", "bottlenecks": [0, 1, 2], "n": 4, "losses": [0.5, 0.1, 0.05, 0.04],
        "order": [0, 1, 2],
        "kl": [[0.2, 0.03, 0.02, 0.02]] * 4, "energy": [[[0.7] * 3, [0.3] * 3]] * 4, **HEAD,
    }  # fmt: skip
    (path / "diagnose-int4.json").write_text(json.dumps(told))
    prompts = {
        x: {k: [y, y, y] for k in ("F1", "EM", "contains", "log-likelihood")} for x, y in (("a", 0.9), ("b", 0.4))
    }
    found = {"n": 8, "tokens": 512, "candidates": prompts, "fit": ["b"], "said": {"a": ["x"], "b": ["y\nz"]}}
    (path / "prompt.json").write_text(json.dumps(found | HEAD))
    return path


def test_claims_are_judged_by_the_same_rules(folder: Path) -> None:
    raw = smollm2.raw_in(folder.parent)
    found = {number: find(raw) for number, find in smollm2.FINDINGS.items()}
    assert {number: x.verdict for number, x in found.items()} == {
        5: HOLDS, 6: "holds in part: INT8, INT3, INT2", 7: HOLDS, 8: HOLDS, 9: HOLDS, 10: HOLDS,
        13: "holds in part: INT8 lossless",
    }  # fmt: skip
    assert all(f"n = {N}" in x.measured for x in found.values())
    assert "`leaveout` is nearest" in found[5].why
    assert "KL 0.0012 / 0.12" in found[6].measured
    assert "layer 0 at 16 bits" in found[7].measured
    assert "1.60 [1.60, 1.60] times the bytes" in found[8].measured


def test_a_claim_that_fails_is_told(folder: Path) -> None:
    (folder / "scorers-512.jsonl").unlink()
    put(folder, "scorers", {"q2c@0.25|bf16": 10}, {}, {})
    assert smollm2.FINDINGS[5](smollm2.raw_in(folder.parent)).verdict == FAILS
    (folder / "coders-512.jsonl").unlink()
    put(folder, "coders", {}, {}, {}, n=8)
    few = smollm2.FINDINGS[8](smollm2.raw_in(folder.parent))
    assert few.verdict == "too few questions for a verdict"
    assert "n = 8" in few.measured
    (folder / "diagnose-int4.json").unlink()
    with pytest.raises(MissingError, match="diagnose-int4"):
        smollm2.FINDINGS[7](smollm2.raw_in(folder.parent))


def test_the_second_column(folder: Path, tmp_path: Path) -> None:
    every = verdicts(tmp_path)
    assert [x.claim.number for x in every if x.real is not None] == [5, 6, 7, 8, 9, 10, 13]
    places = Places(tmp_path / "RESULTS.md", tmp_path / "figures", tmp_path / "docs")
    assert "| SmolLM2-135M, SQuAD |" in table(every, places)
    assert "* **SmolLM2-135M, SQuAD**: **holds**." in page(every)
    assert "`smollm2/coders-512.jsonl`" in page(every)
    (folder / "coders-512.jsonl").unlink()
    gone = {x.claim.number: x.real for x in verdicts(tmp_path)}[8]
    assert gone is not None
    assert gone.verdict == UNMEASURED


def test_pages(folder: Path, tmp_path: Path) -> None:
    places = Places(tmp_path / "RESULTS.md", tmp_path / "figures", tmp_path / "docs")
    written = dict(write_pages(folder, places))
    assert list(written.values()) == [f"smollm2-{x}" for x in ("prompt", *(f"{name}-512" for name in PLANS))]
    for name in written.values():
        text = (places.details / f"{name}.md").read_text()
        tables = [line for line in text.splitlines() if line.startswith("|")]
        assert tables
        assert "nan" not in text
    assert "**`b`** has the highest F1" in (places.details / "smollm2-prompt.md").read_text()
    assert "profiles of 7 calibration texts" in (places.details / "smollm2-profiles-512.md").read_text()
    assert "`leaveout` 0.01" in next(fact(folder, places))
    text = "\n".join(section(folder, places))
    assert "[blind](docs/smollm2-blind-512.md) | B | 512 | 40 |" in text
    assert "| `full\\|int8` | 510 | 2.0x |" in text
    assert list(fact(tmp_path / "none", places)) == section(tmp_path / "none", places) == []
