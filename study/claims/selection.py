"""Claims 5, 16 and 18: which tokens stay, how few will do, and what fewer are worth."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from kvferry.evaluate.measured import Measured
from kvferry.statistics import Estimate, holm
from study.claims.base import PART, Finding, MissingError, Raw, judge, listed, need, within
from study.codec_tables import p_head, p_text, percent

SCORERS, TEXT = "scorers-{}.jsonl", "text-{}.jsonl"
ORDER = ("q2c", "snapkv", "h2o", "random")
READINGS = {
    "all tokens compete": (SCORERS, "{}@0.25|bf16"), "all text kept": (TEXT, "{}@0.25,modality=text_preserving|bf16"),
}  # fmt: skip
NAMES = {"q2c": "Q2C", "snapkv": "SnapKV", "h2o": "H2O", "random": "random"}
VL_CACHE, TENTH, EDGE, BELOW = "vlcache@{:g},budget=sparsity|bf16", 0.1, 0.05, 0.02
SURE = 0.05
"""A p below it counts, corrected for how many there are."""
ACCURACY, FASTER, SOONER, MEMORY, SCORING = 0.98, 7.08, 2.33, 0.90, 0.04
"""VL-Cache's figures."""
DECODE, EVIDENCE = "decode.json", "evidence.json"
OWN_SCORES = "after the picture, and densities"
"""What VL-Cache's scores and budget observe, as ``benchmarks/evidence.py`` calls it."""


def order(raw: Raw) -> Finding:
    """Claim 5, where all of a prompt's tokens compete, and where all of its text stays."""
    said, parts, n = [], [], 0
    held: dict[str, dict[str, bool]] = {}
    for reading, (pattern, recipe) in READINGS.items():
        rows = [recipe.format(name) for name in ORDER]
        texts = {}
        for model in raw.models(pattern):
            measured = raw.measured(pattern.format(model))
            need(measured, *rows)
            n = measured.n
            texts[model] = " / ".join(within(measured.of_full(row)) for row in rows)
            against = [measured.compare(a, b) for a, b in pairwise(rows)]
            ps = holm([x.p for x in against])
            sure = [x.difference.low > 0 and p < SURE for x, p in zip(against, ps, strict=True)]
            held.setdefault(reading, {})[model] = all(sure)
            for (one, two), found, p in zip(pairwise(ORDER), against, ps, strict=True):
                points = f"{percent(found.difference)} points, {p_head(len(ps))} {p_text(p)}: {found.words}"
                parts.append(f"{model}, {reading}, {NAMES[one]} to {NAMES[two]}: {points}")
        said.append(f"{reading}: {listed(texts, n)}")
    return Finding(
        f"{' / '.join(NAMES.values())}, % of full at 25 %, protocol A; {'; '.join(said)}",
        judge(held),
        "Where text competes Q2C drops the prompt's own, which SnapKV's window keeps."
        if judge(held).startswith(PART)
        else "The order is that of questions answered rightly.",
        f"each step is more right, p (McNemar's, Holm over the {len(ORDER) - 1} steps of a model) below {SURE}, "
        "both where all tokens compete and where all text is kept",
        tuple(parts),
    )


def tenth(raw: Raw) -> Finding:
    """Claim 16."""
    row = VL_CACHE.format(TENTH)
    accuracy: dict[str, Estimate] = {}
    parts, n = [], 0
    for model in raw.models(SCORERS):
        measured = _scored(raw, model, row)
        n, accuracy[model] = measured.n, measured.of_full(row)
        plain = "vlcache@0.1|bf16"
        if plain in measured.points:
            parts.append(f"{model}, the same scores with equal budgets: {percent(measured.of_full(plain))} % of full")
    held: dict[str, dict[str, bool]] = {"accuracy": {m: x.mean >= ACCURACY for m, x in accuracy.items()}}
    texts = {model: within(x) for model, x in accuracy.items()}
    said = [f"% of full at 10 %, protocol A: {listed(texts, n)}"]
    benched = raw.json(DECODE)
    rows = speeds(benched, TENTH)
    fastest, (low, high) = max(((ratio, ends) for _, ratio, ends in rows), key=lambda x: x[0])
    whole = [(x["tokens"], _ratio(x["full"], x["kept"])) for x in benched["whole"]]
    sooner = max(x[1][0] for x in whole)
    less = 1 - 1 / max(memory(benched, TENTH).values())
    said.append(
        f"on one CPU core, 2B width: decoding up to {fastest:.2f}x [{low:.2f}, {high:.2f}], prompt and 100 tokens up "
        f"to {sooner:.2f}x, memory {less:.0%} less"
    )
    parts += [f"decoding, {shape}: {ratio:.2f}x [{a:.2f}, {b:.2f}]" for shape, ratio, (a, b) in rows]
    parts += [f"prompt of {t} and 100 tokens: {r:.2f}x [{a:.2f}, {b:.2f}]" for t, (r, (a, b)) in whole]
    after = memory(benched, TENTH, "bytes_after")
    less_after = ", ".join(f"{tokens:,} tokens {1 - 1 / x:.0%}" for tokens, x in after.items())
    parts.append(f"less memory, 100 new tokens included: {less_after}")
    parts.append(_bench(benched))
    cost = _scoring(raw)
    share, ends = cost[OWN_SCORES]
    said.append(f"scoring {100 * (share - 1):+.1f} % of prefill [{_over(ends)}]")
    parts += [f"prefill, {kind}: {100 * (x - 1):+.1f} % [{_over(e)}]" for kind, (x, e) in cost.items()]
    held |= {
        "decoding": {"": fastest >= FASTER}, "100 tokens": {"": sooner >= SOONER},
        "memory": {"": round(less, 2) >= MEMORY}, "scoring": {"": share - 1 <= SCORING},
    }  # fmt: skip
    return Finding(
        "; ".join(said),
        judge(held),
        "Speed grows with how much of a step is reading the cache, so with length and batch; prefill is not saved.",
        f"accuracy {ACCURACY:.0%}, decoding {FASTER}x, 100 tokens {SOONER}x somewhere among the shapes measured, "
        f"memory {MEMORY:.0%} less, scoring at most {SCORING:.0%}",
        tuple(parts),
    )


def cliff(raw: Raw) -> Finding:
    """Claim 18."""
    above, below = VL_CACHE.format(EDGE), VL_CACHE.format(BELOW)
    texts, held, parts, n, left, better = {}, {}, [], 0, 0.0, False
    for model in raw.models(SCORERS):
        measured = _scored(raw, model, above, below)
        left = max(left, BELOW * float(np.mean([x.tokens for x in measured.lines])))
        n = measured.n
        texts[model] = f"{within(measured.of_full(above))} to {within(measured.of_full(below))}"
        held[model] = measured.of_full(below).high < 0.5
        for way in ("vlcache@{:g}|bf16", "leaveout@{:g}|bf16"):
            rows = [way.format(share) for share in (EDGE, BELOW)]
            if all(row in measured.points for row in rows):
                ends = " to ".join(percent(measured.of_full(row)) for row in rows)
                parts.append(f"{model}, `{way.format(EDGE)}` to {BELOW:.0%}: {ends} % of full")
        if measured.floor:
            better |= measured.compare(below, measured.floor).difference.low > 0
            parts.append(f"{model}, no visual token: {percent(measured.of_full(measured.floor))} % of full")
    return Finding(
        f"% of full from {EDGE:.0%} to {BELOW:.0%} of the tokens, protocol A: {listed(texts, n)}",
        judge({"": held}),
        f"About {left:.0f} tokens a layer are left at {BELOW:.0%}; the answers are "
        f"{'still' if better else 'no'} better than without the picture.",
        f"at {BELOW:.0%} the whole interval lies below half of the full cache's accuracy",
        tuple(parts),
    )


def with_text(raw: Raw, share: float) -> str:
    """Q2C where the budget is taken from visual tokens alone, in percent of full."""
    row = f"q2c@{share:g},modality=text_preserving|bf16"
    found = {}
    for model in raw.models(TEXT):
        measured = raw.measured(TEXT.format(model))
        need(measured, row)
        found[model] = within(measured.of_full(row))
    return ", ".join(f"{model} {text}" for model, text in found.items())


def speeds(benched: Mapping[str, Any], share: float) -> list[tuple[str, float, tuple[float, float]]]:
    """Of every shape, how many times faster a token is on ``share`` of the cache than on all of it."""
    rows = {(x["tokens"], x["batch"], x["kept"]): x["seconds"] for x in benched["decode"]}
    shapes = dict.fromkeys((tokens, batch) for tokens, batch, _ in rows)
    return [
        (f"{tokens:,} tokens, {batch} at once", *_ratio(rows[tokens, batch, 1.0], rows[tokens, batch, share]))
        for tokens, batch in shapes
    ]


def memory(benched: Mapping[str, Any], share: float, field: str = "cache_bytes") -> dict[int, float]:
    """Of every length, how many times more bytes the whole cache takes; ``bytes_after``: 100 new tokens included."""
    rows = {(x["tokens"], x["kept"]): x[field] for x in benched["decode"]}
    lengths = dict.fromkeys(tokens for tokens, _ in rows)
    return {tokens: rows[tokens, 1.0] / rows[tokens, share] for tokens in lengths}


def _ratio(one: list[float], two: list[float]) -> tuple[float, tuple[float, float]]:
    """Of medians, and the least and the largest of a round's own."""
    rounds = np.array(one) / np.array(two)
    return median(one) / median(two), (float(rounds.min()), float(rounds.max()))


def _scoring(raw: Raw) -> dict[str, tuple[float, tuple[float, float]]]:
    """Prefill with each sort of scores as a ratio to prefill without."""
    kinds = raw.json(EVIDENCE)["kinds"]
    if OWN_SCORES not in kinds:
        raise MissingError(f"{EVIDENCE} lacks {OWN_SCORES!r}")
    plain = kinds["plain"]["rounds"]
    return {kind: _ratio(x["rounds"], plain) for kind, x in kinds.items() if x["bound"] is not None}


def _over(ends: tuple[float, float]) -> str:
    return ", ".join(f"{100 * (x - 1):+.1f}" for x in ends)


def _bench(benched: Mapping[str, Any]) -> str:
    rounds = len(benched["decode"][0]["seconds"])
    return (
        f"random weights and caches of the 2B model's width, {benched['layers']} of 28 layers, {benched['dtype']}, "
        f"{benched['threads']} thread of {benched['device']}, {rounds} rounds in turn, processor time"
    )


def _scored(raw: Raw, model: str, *rows: str) -> Measured:
    measured = raw.measured(SCORERS.format(model))
    need(measured, *rows)
    return measured
