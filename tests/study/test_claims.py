"""Verdicts on claims, from small made-up raw results that are right, wrong, or not there."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvferry.evaluate.records import Line, Outcome
from kvferry.statistics import Estimate
from study.capsule import VARIANTS
from study.claims import FINDINGS, verdicts
from study.claims.base import (
    FAILS,
    HOLDS,
    PART,
    UNMEASURED,
    UNTESTABLE,
    Finding,
    MissingError,
    Raw,
    judge,
    within,
)
from study.claims.capsule import ROW
from study.claims.page import page, table
from study.claims.sources import CLAIMS
from study.page import Places
from tests.evaluate.test_tables import write

HEAD = {"command": "kvferry make it", "commit": "c" * 40}


def lines(rows: dict[str, tuple[int, int]], n: int = 200) -> list[Line]:
    """Row -> (bytes, right answers of 100): right on the first so many of a fixed shuffle, so that rows are nested."""
    return [
        Line(
            index=i, kind="lookup" if i % 2 else "colour", protocol="A", bf16_bytes=1000, image_bytes=99, tokens=100,
            outcomes={row: Outcome(int(i * 37 % 100 < right), size, 0.1) for row, (size, right) in rows.items()},
        )
        for i in range(n)
    ]  # fmt: skip


def sweep(folder: Path, name: str, rows: dict[str, tuple[int, int]]) -> None:
    write(folder / name, lines({"full|bf16": (1000, 100), "none|bf16": (50, 20), **rows}))


def put(folder: Path, name: str, **facts: Any) -> None:
    (folder / name).write_text(json.dumps({**HEAD, **facts}))


def found(folder: Path, number: int) -> Finding:
    return FINDINGS[number](Raw(folder))


def analysis(folder: Path, rank: float = 0.5, top: float = 0.4, skipped: float = 1.0, energy: float = 0.7) -> None:
    spread = [x / 1000 for x in range(-15, 16)]
    put(
        folder, "analyze-cloud.json", axes={"kind": ["keys", "un-rotated keys", "values"]},
        rank={"samples": [[[rank + s, 1.0], [None if s > 0 else 0.5, 1.0], [rank + s, 1.0]] for s in spread],
              "tokens": 15.2},
        energy={"samples": [[0.9, 0.9, energy + s] for s in spread]},
        tail={"samples": [top + s for s in spread], "visual": [[top] * 101, [0.1] * 101]},
        harm={"samples": [[i % 2, 0.0, skipped if i % 2 == 0 else 0.1] for i in range(40)]},
    )  # fmt: skip


def test_a_claim_of_several_parts() -> None:
    assert judge({"": {"cloud": True, "edge": True}}) == HOLDS
    assert judge({"": {"cloud": False}, "b": {"edge": False}}) == FAILS
    assert judge({"": {"cloud": True, "edge": False}}) == f"{PART}: on cloud"
    mixed = {"speed": {"": True}, "loss": {"a": True, "b": True, "c": False}, "memory": {"": False}}
    assert judge(mixed) == f"{PART}: speed, loss on a and b"
    assert within(Estimate(0.5, 0.4, 0.55, 9)) == "50.0±10.0"


def test_every_claim_is_there_once_and_says_what_to_run(tmp_path: Path) -> None:
    assert [claim.number for claim in CLAIMS] == list(range(1, 19))
    every = verdicts(tmp_path)
    assert {x.finding.verdict for x in every} == {UNMEASURED}
    for x in every:
        assert f"Run `{x.claim.make}`" in x.finding.why
    places = Places(tmp_path / "RESULTS.md", tmp_path / "figures", tmp_path / "docs")
    text = table(every, places)
    assert "18 claims: not measured 18." in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 20
    assert len({re.sub(r"\\\|", "", row).count("|") for row in rows}) == 1
    assert page(every).count("## Claim ") == 18


@pytest.mark.parametrize(("rank", "verdict"), [(0.5, HOLDS), (0.7, HOLDS), (0.705, FAILS), (0.9, FAILS)])
def test_rank(tmp_path: Path, rank: float, verdict: str) -> None:
    analysis(tmp_path, rank=rank)
    finding = found(tmp_path, 1)
    assert finding.verdict == verdict
    assert "n = 31" in finding.measured
    assert "un-rotated keys 0.50 [0.50, 0.50]" in finding.more[0]
    assert "15 tokens" in finding.why


def test_a_long_tail_is_one_above_the_exponential(tmp_path: Path) -> None:
    analysis(tmp_path, top=0.4)
    assert found(tmp_path, 2).verdict == HOLDS
    assert "1 of 2 layers" in found(tmp_path, 2).more[0]
    analysis(tmp_path, top=0.33)
    assert found(tmp_path, 2).verdict == FAILS


def test_skipping_is_about_questions_of_text_alone(tmp_path: Path) -> None:
    analysis(tmp_path)
    assert found(tmp_path, 4).verdict == HOLDS
    assert "n = 20" in found(tmp_path, 4).measured
    analysis(tmp_path, skipped=0.9)
    assert found(tmp_path, 4).verdict == FAILS


def test_bandwidth_takes_the_best_of_either_sort(tmp_path: Path) -> None:
    agnostic = {"q2c@0.5|bf16": (500, 100), "q2c@0.25|bf16": (250, 50)}
    sweep(tmp_path, "scorers-cloud.jsonl", {**agnostic, "vlcache@0.25|bf16": (250, 100)})
    with pytest.raises(MissingError, match="protocol B"):
        found(tmp_path, 3)
    both = lines({"full|bf16": (1000, 100), **agnostic, "vlcache@0.25|bf16": (250, 100)})
    other = [Line(**{**x.__dict__, "protocol": "B", "outcomes": dict(x.outcomes)}) for x in both]
    write(tmp_path / "scorers-cloud.jsonl", both + other)
    finding = found(tmp_path, 3)
    assert finding.verdict == HOLDS
    assert "protocol A: cloud 0.5" in finding.measured


def ranked(shares: Sequence[int], kept: Sequence[int], folder: Path) -> Finding:
    names = ("q2c", "snapkv", "h2o", "random")
    sweep(folder, "scorers-cloud.jsonl", {f"{x}@0.25|bf16": (250, s) for x, s in zip(names, shares, strict=True)})
    text = {f"{x}@0.25,modality=text_preserving|bf16": (250, s) for x, s in zip(names, kept, strict=True)}
    sweep(folder, "text-cloud.jsonl", text)
    return found(folder, 5)


def test_an_order_needs_every_step(tmp_path: Path) -> None:
    assert ranked((90, 70, 50, 20), (90, 70, 50, 20), tmp_path).verdict == HOLDS
    some = ranked((40, 90, 70, 20), (90, 80, 60, 20), tmp_path)
    assert some.verdict == f"{PART}: all text kept"
    assert "cloud, all tokens compete, SnapKV to H2O: 20.0 [" in "".join(some.more)
    assert ranked((20, 30, 40, 50), (50, 50, 50, 50), tmp_path).verdict == FAILS


def codecs(folder: Path, **changes: tuple[int, int]) -> None:
    rows = {
        "full|int8": (500, 100), "full|int4": (260, 99), "full|int3": (200, 93), "full|int2": (130, 15),
        "full|mixed@m.json": (280, 99), "full|svd:64": (900, 100), "full|svd:32": (500, 60), "full|svd:16": (300, 55),
        "full|delta:10": (300, 90), "full|delta:0": (200, 92), "q2c@0.75|int4": (190, 96),
    }  # fmt: skip
    sweep(folder, "codecs-cloud.jsonl", {**rows, **changes})


def test_bits(tmp_path: Path) -> None:
    codecs(tmp_path)
    assert found(tmp_path, 6).verdict == HOLDS
    codecs(tmp_path, **{"full|int2": (130, 80), "full|int3": (200, 100)})
    assert found(tmp_path, 6).verdict == f"{PART}: INT8, INT4"
    sweep(tmp_path, "codecs-cloud.jsonl", {"full|int8": (500, 100)})
    with pytest.raises(MissingError, match=r"full\|int4"):
        found(tmp_path, 6)


def test_delta(tmp_path: Path) -> None:
    codecs(tmp_path)
    assert found(tmp_path, 8).verdict == HOLDS
    codecs(tmp_path, **{"full|delta:10": (150, 92)})
    assert found(tmp_path, 8).verdict == FAILS
    codecs(tmp_path, **{"full|delta:10": (300, 100)})
    assert found(tmp_path, 8).verdict == FAILS


def test_a_cliff_may_stand_elsewhere(tmp_path: Path) -> None:
    analysis(tmp_path)
    codecs(tmp_path)
    assert found(tmp_path, 9).verdict == HOLDS
    codecs(tmp_path, **{"full|svd:32": (500, 98)})
    assert found(tmp_path, 9).verdict == f"{PART}: a cliff, energy"
    assert "rank 32 to 16" in found(tmp_path, 9).measured


def test_retention(tmp_path: Path) -> None:
    codecs(tmp_path)
    sweep(tmp_path, "text-cloud.jsonl", {"q2c@0.75,modality=text_preserving|bf16": (750, 97)})
    assert found(tmp_path, 10).verdict == HOLDS
    assert "at 19.0%" in found(tmp_path, 10).measured
    codecs(tmp_path, **{"q2c@0.75|int4": (190, 60)})
    assert found(tmp_path, 10).verdict == FAILS


def test_steps(tmp_path: Path) -> None:
    codecs(tmp_path)
    assert found(tmp_path, 13).verdict == f"{PART}: INT8 lossless"
    codecs(tmp_path, **{"full|mixed@m.json": (280, 93), "full|int4": (260, 69)})
    assert found(tmp_path, 13).verdict == HOLDS


def diagnosed(folder: Path, bits: int, pattern: str, uniform: float, mixed: float, size: int) -> None:
    check = {"full|int4": (1.0, 100), f"full|int{bits}": (uniform, 60), f"full|mixed@x{bits}.json": (mixed, size)}
    rows = [
        {"recipe": recipe, "of_full": [share, share - 0.02, share + 0.02], "bytes": nbytes, "n": 540}
        for recipe, (share, nbytes) in check.items()
    ]
    put(folder, f"diagnose-cloud-int{bits}.json", pattern=pattern, words=f"{pattern}: so", n=270, check=rows)


def test_protection(tmp_path: Path) -> None:
    diagnosed(tmp_path, 4, "none", 1.0, 1.0, 100)
    assert found(tmp_path, 7).verdict == UNTESTABLE
    diagnosed(tmp_path, 2, "concentrated", 0.8, 0.9, 90)
    assert found(tmp_path, 7).verdict == FAILS
    diagnosed(tmp_path, 2, "concentrated", 0.8, 0.99, 90)
    assert found(tmp_path, 7).verdict == HOLDS
    diagnosed(tmp_path, 2, "concentrated", 0.8, 0.99, 120)
    assert found(tmp_path, 7).verdict == FAILS
    diagnosed(tmp_path, 2, "distributed", 0.8, 0.99, 200)
    assert found(tmp_path, 7).verdict == UNTESTABLE


def simulated(*shares: tuple[str, str, float, float]) -> list[dict[str, Any]]:
    return [
        {
            "deadline": 5.0, "way": way, "allocation": allocation,
            **{key: {"mean": x, "low": x, "high": x, "n": 100}
               for key, x in (("on_time", on_time), ("rounds_on_time", on_time), ("of_oracle", of_oracle))},
        }
        for way, allocation, on_time, of_oracle in shares
    ]  # fmt: skip


def test_the_policy_on_links(tmp_path: Path) -> None:
    def link(name: str, greedy: tuple[float, float], static: float) -> None:
        ways = (("greedy", "", *greedy), ("risk-aware", "", *greedy), ("static:kv:full|int8", "", static, 0.5))
        rows = simulated(*ways)
        put(tmp_path, name, title="links", requests=1000, rows=rows)

    link("simulate-5g-uplink.json", (0.9, 0.99), 0.5)
    assert found(tmp_path, 14).verdict == HOLDS
    link("simulate-5g-downlink.json", (0.5, 0.9), 0.6)
    assert found(tmp_path, 14).verdict.startswith(f"{PART}: within 1.5 % of the oracle on 5G at uplink rates")
    (tmp_path / "simulate-5g-uplink.json").unlink()
    assert found(tmp_path, 14).verdict == FAILS


def test_agents(tmp_path: Path) -> None:
    static = "static:kv:full|int8"
    for agents, aware in ((4, 0.98), (8, 0.0)):
        rows = simulated((static, "equal", 0.0, 0.5), (static, "model_aware", aware, 0.5))
        put(tmp_path, f"simulate-agents-{agents}.json", title="t", rows=rows)
    assert found(tmp_path, 15).verdict == HOLDS
    put(tmp_path, "simulate-fallback-8.json", title="t", rows=simulated(("risk-aware", "model_aware", 0.5, 0.5)))
    assert found(tmp_path, 15).verdict == f"{PART}: 4 agents, 8 agents"


def benched(folder: Path, tenth: float = 0.1, whole: float = 0.3, scoring: float = 1.02) -> None:
    decode = [
        {"tokens": 4096, "batch": batch, "kept": share, "seconds": [took * batch] * 3, "cache_bytes": int(1000 * share),
         "bytes_after": int(1000 * share) + 1}
        for batch in (1, 8) for share, took in ((1.0, 1.0), (0.4, 0.45), (0.1, tenth if batch == 8 else 0.9))
    ]  # fmt: skip
    runs = [{"tokens": 4096, "full": [1.0] * 3, "kept": [whole] * 3}]
    put(folder, "decode.json", decode=decode, whole=runs, layers=2, dtype="float32", threads=1, device="x")
    kinds = {"plain": {"bound": None, "rounds": [1.0] * 3},
             "after the picture, and densities": {"bound": 1.5, "rounds": [scoring] * 3}}  # fmt: skip
    put(folder, "evidence.json", kinds=kinds, tokens=4096)


def test_a_tenth(tmp_path: Path) -> None:
    sweep(tmp_path, "scorers-cloud.jsonl", {"vlcache@0.1,budget=sparsity|bf16": (100, 98)})
    with pytest.raises(MissingError, match=r"decode\.json"):
        found(tmp_path, 16)
    benched(tmp_path)
    assert found(tmp_path, 16).verdict == HOLDS
    assert "up to 10.00x" in found(tmp_path, 16).measured
    sweep(tmp_path, "scorers-cloud.jsonl", {"vlcache@0.1,budget=sparsity|bf16": (100, 90)})
    benched(tmp_path, whole=0.9, scoring=1.1)
    assert found(tmp_path, 16).verdict == f"{PART}: decoding, memory"


def encapsulated(folder: Path, right: dict[str, int], size: int) -> Finding:
    """Claim 17, where a capsule has so many right answers of 100 under each protocol."""
    both = []
    for protocol, share in right.items():
        rows = {ROW: (size, share), VARIANTS["keys only"]: (700, 100), "full|bf16": (1000, 100), "none|bf16": (50, 20)}
        both += [replace(line, protocol=protocol) for line in lines(rows)]  # type: ignore[arg-type]
    write(folder / "capsule-cloud.jsonl", both)
    return found(folder, 17)


def test_a_capsule(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="capsule-MODEL"):
        found(tmp_path, 17)
    whole = encapsulated(tmp_path, {"A": 100, "B": 100}, 400)
    assert whole.verdict == f"{PART}: no loss; memory and speed not measured"
    assert "A 100.0±0.0, B 100.0±0.0 at 2.50x" in whole.measured
    assert any("protocol B, against keys only: points 0.0" in part for part in whole.more)
    assert encapsulated(tmp_path, {"A": 100, "B": 80}, 500).verdict == f"{PART}: no loss under protocol A"
    assert encapsulated(tmp_path, {"A": 80, "B": 80}, 500).verdict == FAILS
    benched(tmp_path)
    assert "of a cache of 40 % of the tokens" in encapsulated(tmp_path, {"A": 80, "B": 80}, 500).more[-1]


def test_a_collapse(tmp_path: Path) -> None:
    rows = {"vlcache@0.25|bf16": (250, 100), "vlcache@0.05,budget=sparsity|bf16": (50, 80)}
    sweep(tmp_path, "scorers-cloud.jsonl", {**rows, "vlcache@0.02,budget=sparsity|bf16": (20, 20)})
    assert found(tmp_path, 18).verdict == HOLDS
    assert "no better" in found(tmp_path, 18).why
    sweep(tmp_path, "scorers-cloud.jsonl", {**rows, "vlcache@0.02,budget=sparsity|bf16": (20, 70)})
    assert found(tmp_path, 18).verdict == FAILS


def scouted(folder: Path, shares: Sequence[float], edge: int, sent: int, name: str = "edge") -> None:
    """A trial of 40 questions of 100 visual tokens: overlaps by fraction, right answers of 40 by the edge's choice."""
    fractions = [0.75, 0.5, 0.25]
    plan = {"edge": "e", "cloud": "c", "scorers": ["q2c"], "fractions": fractions, "split": "test", "n": 40, "start": 0,
            "kinds": []}  # fmt: skip
    questions = [
        [i, "colour", 100, 100_000, 500, 1, 0, 1, [1, 1, 1],
         [[round(share * 100 * kept), 1, int(i < edge), sent, 60, 20]
          for share, kept in zip(shares, fractions, strict=True)]]
        for i in range(40)
    ]  # fmt: skip
    text = "\n".join(json.dumps(x) for x in [{**HEAD, "scout": plan}, *questions])
    (folder / f"scout-{name}.jsonl").write_text(text + "\n")


def test_one_model_chooses_for_another(tmp_path: Path) -> None:
    scouted(tmp_path, (0.84, 0.66, 0.48), 40, 30)
    assert found(tmp_path, 11).verdict == HOLDS
    assert found(tmp_path, 12).verdict == HOLDS
    assert "3333±0x" in found(tmp_path, 12).measured
    scouted(tmp_path, (0.7, 0.66, 0.48), 30, 30, "control")
    parts = "overlap at 75% on edge, overlap at 50%, overlap at 25%, answers on edge"
    assert found(tmp_path, 11).verdict == f"{PART}: {parts}"
    assert "costs answers" in found(tmp_path, 11).why
    (tmp_path / "scout-control.jsonl").unlink()
    scouted(tmp_path, (0.8, 0.6, 0.48), 20, 200)
    assert found(tmp_path, 11).verdict == f"{PART}: overlap at 25%"
    assert found(tmp_path, 12).verdict == FAILS


def test_a_verdict_names_its_files_and_commands(tmp_path: Path) -> None:
    analysis(tmp_path)
    first = verdicts(tmp_path)[0]
    assert first.commands == (("analyze-cloud.json", "kvferry make it", "c" * 40),)
    text = page(verdicts(tmp_path))
    assert "| `analyze-cloud.json` | `cccccccccccc` | `kvferry make it` |" in text
    assert "From `analyze-cloud.json`" in text
