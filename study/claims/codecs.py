"""Claims 6 to 10: how few bits will do."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from kvferry.evaluate.measured import Measured
from kvferry.evaluate.tables import interval
from kvferry.statistics import Estimate, mean_interval
from study.claims.base import (
    FAILS,
    HOLDS,
    PART,
    UNTESTABLE,
    Finding,
    MissingError,
    Raw,
    judge,
    listed,
    need,
    within,
)  # fmt: skip
from study.claims.selection import with_text
from study.codec_tables import NEAR, compared, delta_pairs, p_head, p_text, percent, svd_points

CODECS = "codecs-{}.jsonl"
ANALYSIS = "analyze-{}.json"
DIAGNOSIS = "diagnose-{}-int{}.json"
TRIED = (4, 2)
LOSSLESS, NEARLY, LITTLE, LITTLE_AGAIN = 0.994, 0.96, 0.93, 0.15
"""INT8, INT4, INT3 and INT2 in the sources."""
RESTORED = 0.95
"""Share of the full cache's accuracy at which damage counts as undone."""
RANKS = (64, 32)
DROP = -0.2
"""A fall by 20 points from one rank to the next is a cliff."""
TOP_ENERGY = 0.616
KEPT, BYTES = 0.96, 0.1875


def bits(raw: Raw) -> Finding:
    """Claim 6."""
    texts, parts, n = {}, [], 0
    held: dict[str, dict[str, bool]] = {}
    for model in raw.models(CODECS):
        measured = raw.measured(CODECS.format(model))
        rows = [f"full|int{bits}" for bits in (8, 4, 3, 2)]
        need(measured, *rows)
        n, shares = measured.n, [measured.of_full(row) for row in rows]
        texts[model] = " / ".join(within(share) for share in shares)
        tests = {
            "INT8": shares[0].low >= LOSSLESS,
            "INT4": shares[1].low >= NEARLY,
            "INT3": shares[2].low <= LITTLE <= shares[2].high,
            "INT2": shares[3].low <= LITTLE_AGAIN <= shares[3].high,
        }
        for part, holds in tests.items():
            held.setdefault(part, {})[model] = holds
        parts += [f"{model}, `{row}`: {percent(x)} % of full" for row, x in zip(rows, shares, strict=True)]
    return Finding(
        f"INT8 / 4 / 3 / 2, % of full, protocol A: {listed(texts, n)}",
        judge(held),
        "Answers of one or two words from a small model stand more noise: losses set in later and stay smaller.",
        "INT8, INT4: the whole interval reaches 99.4 and 96 %; INT3, INT2: the interval holds the sources' figure",
        tuple(parts),
    )


def protection(raw: Raw) -> Finding:
    """Claim 7: judged at the most bits that damage a model, with the damage in few layers."""
    said, parts = {}, []
    held: dict[str, bool] = {}
    n = 0
    for model in raw.models(DIAGNOSIS.format("{}", TRIED[0])):
        for width in TRIED:
            file = DIAGNOSIS.format(model, width)
            if not raw.has(file):
                continue
            found = raw.json(file)
            if "check" not in found:
                raise MissingError(f"{file} was made without --check 540")
            checked = {row["recipe"]: row for row in found["check"]}
            mixed = next(row for recipe, row in checked.items() if "mixed@" in recipe)
            plain = checked[f"full|int{width}"]
            n = mixed["n"]
            parts.append(f"{model}: {found['words']} (n = {found['n']}); {_checked(plain)}, then {_checked(mixed)}")
            if found["pattern"] == "concentrated" and model not in held:
                wider = checked["full|int4"]
                held[model] = mixed["of_full"][1] >= RESTORED and mixed["bytes"] < wider["bytes"]
                said[model] = (
                    f"INT{width} {100 * plain['of_full'][0]:.1f}, one layer protected {_share(mixed)} at "
                    f"{mixed['bytes'] / wider['bytes']:.2f} times INT4's bytes"
                )
            elif width == TRIED[0] and found["pattern"] == "none":
                said.setdefault(f"{model} INT4", f"{_share(plain)}, nothing to restore")
    verdict = UNTESTABLE if not held else HOLDS if all(held.values()) else FAILS
    return Finding(
        f"% of full: {listed(said, n)}",
        verdict,
        "INT4 damages no model here; where fewer bits do and few layers share the damage, protection lifts the "
        "accuracy without restoring it."
        if verdict == FAILS
        else "INT4 damages no model here, and at fewer bits no damage is concentrated."
        if verdict == UNTESTABLE
        else "Judged where uniform bits lose over 5 % and few layers share it.",
        "where uniform bits lose over 5 % and a quarter of the layers or fewer lose over 3 % alone, 16 bits for those "
        "bring back 95 % of full (whole interval) in fewer bytes than INT4",
        tuple(parts),
    )


def _share(row: dict[str, list[float]]) -> str:
    mean, low, high = row["of_full"]
    return percent(Estimate(mean, low, high, 0))


def _checked(row: dict[str, list[float]]) -> str:
    return f"`{row['recipe']}` {_share(row)} % of full at {row['bytes']:,.0f} bytes"


def delta(raw: Raw) -> Finding:
    """Claim 8."""
    texts: dict[str, str] = {}
    parts, n = [], 0
    held: dict[str, bool] = {}
    for model in raw.models(CODECS):
        measured = raw.measured(CODECS.format(model))
        pairs = delta_pairs(measured)
        if not pairs:
            continue
        n = measured.n
        worse = []
        for (what, a, b), against in zip(pairs, compared(measured, pairs), strict=True):
            size = measured.size_ratio(a.name, b.name)
            kl = measured.kl_ratio(a.name, b.name)
            more = "" if kl is None else f", KL {interval(kl, 2)} times"
            parts.append(
                f"{model}, {what}: `{a.name}` to `{b.name}`: {interval(size, 2)} times the bytes, points "
                f"{percent(against.difference)} ({p_head(len(pairs))} {p_text(against.p)}): {against.words}{more}"
            )
            if what == "same steps":
                worse.append(size.low > 1 and against.difference.low <= 0)
                texts.setdefault(model, f"{interval(size, 2)}x, {percent(against.difference)}")
            elif 1 / NEAR <= size.mean <= NEAR:
                worse.append(against.difference.high < 0 or (kl is not None and kl.low > 1))
        held[model] = all(worse) and bool(worse)
    if not held:
        raise MissingError("the results hold no pair of delta:10 and delta:0; sweep both")
    return Finding(
        f"differences to direct coding in the same steps, bytes and points, protocol A: {listed(texts, n)}",
        judge({"": held}),
        "Differences from an anchor token take more bytes than the numbers themselves, by the same range coder, and "
        "answer no better."
        if all(held.values())
        else "Differences from an anchor token are held against the numbers themselves, by the same range coder.",
        "in the same steps more bytes without more right answers, and at equal bytes (within a factor of 1.25) fewer "
        "right or more KL",
        tuple(parts),
    )


def spectrum(raw: Raw) -> Finding:
    """Claim 9."""
    texts, parts, n = {}, [], 0
    held: dict[str, dict[str, bool]] = {"a cliff": {}, "between rank 64 and 32": {}}
    for model in raw.models(CODECS):
        measured = raw.measured(CODECS.format(model))
        points = svd_points(measured)
        if len(points) < 2:
            continue
        n = measured.n
        falls = {(a.rank, b.rank): measured.compare(b.name, a.name).difference for a, b in pairwise(points)}
        worst = min(falls, key=lambda ranks: falls[ranks].mean)
        held["a cliff"][model] = falls[worst].high < DROP
        held["between rank 64 and 32"][model] = RANKS in falls and falls[RANKS].high < DROP
        texts[model] = f"rank {worst[0]} to {worst[1]}: {percent(falls[worst])} points"
        parts += [f"{model}, `{p.name}`: {percent(measured.of_full(p.name))} % of full" for p in points]
    if not texts:
        raise MissingError("the results hold no row svd:R at two ranks; sweep them")
    said = [f"largest fall, protocol A: {listed(texts, n)}"]
    energy, of = _energy(raw)
    held["energy"] = {m: any(x.low >= TOP_ENERGY for x in kinds) for m, kinds in energy.items()}
    shares = {m: " / ".join(map(within, kinds)) for m, kinds in energy.items()}
    said.append(f"top 5 % of keys / values hold, %: {listed(shares, of)}")
    return Finding(
        "; ".join(said),
        judge(held),
        "The cliff is there, at far lower ranks: a layer here is only 64 numbers wide, all heads together."
        if judge(held).startswith(PART)
        else "Ranks are those of one layer's keys or values, all heads together.",
        "a cliff is a fall of over 20 points (whole interval) from one measured rank to the next; energy: keys or "
        "values reach the sources' share",
        tuple(parts),
    )


def _energy(raw: Raw) -> tuple[dict[str, list[Estimate]], int]:
    found, n = {}, 0
    for model in raw.models(ANALYSIS):
        analysis = raw.json(ANALYSIS.format(model))
        kinds = analysis["axes"]["kind"]
        samples = np.array(analysis["energy"]["samples"], np.float64)
        found[model] = [mean_interval(samples[:, kinds.index(kind)]) for kind in ("keys", "values")]
        n = len(samples)
    return found, n


def retention(raw: Raw) -> Finding:
    """Claim 10."""
    row, whole = "q2c@0.75|int4", "full|int4"
    texts, parts, n = {}, [], 0
    held: dict[str, bool] = {}
    for model in raw.models(CODECS):
        measured = raw.measured(CODECS.format(model))
        need(measured, row, whole)
        n, share = measured.n, measured.of_full(row)
        size = measured.bytes[row] / measured.bf16
        held[model] = share.high >= KEPT
        texts[model] = f"{within(share)} at {size:.1%} (all tokens, INT4: {within(measured.of_full(whole))})"
        parts += _retained(measured, model)
    return Finding(
        f"% of full at the share of the BF16 bytes, protocol A: {listed(texts, n)}",
        judge({"": held}),
        f"INT4 alone costs little; Q2C drops text of the prompt. Keeping all text it reaches {with_text(raw, 0.75)} %.",
        "the interval reaches 96 %",
        tuple(parts),
    )


def _retained(measured: Measured, model: str) -> list[str]:
    rows = [p for p in measured.points.values() if p.base == "q2c" and p.bits]
    return [f"{model}, `{p.name}`: {percent(measured.of_full(p.name))} % of full at "
            f"{measured.bytes[p.name] / measured.bf16:.1%} of the bytes" for p in rows]  # fmt: skip
