"""Claim 17: the learned capsule."""

from __future__ import annotations

from kvferry.evaluate.measured import KEPT, SAME, Measured
from kvferry.evaluate.records import Protocol
from kvferry.evaluate.tables import interval
from study.capsule import CLAIMED, EVICTED, VARIANTS
from study.claims.base import FAILS, HOLDS, PART, Finding, Raw, judge, listed, need, within
from study.claims.selection import DECODE, memory, speeds
from study.codec_tables import percent

RAW = "capsule-{}.jsonl"
ROW = f"full|capsule:{CLAIMED:g},codec=bf16"
PROTOCOLS: tuple[Protocol, ...] = ("A", "B")


def capsule(raw: Raw) -> Finding:
    """Claim 17, judged on the learned capsule itself; memory and speed by what dropping as many tokens gives."""
    texts: dict[str, str] = {}
    held: dict[str, dict[str, bool]] = {}
    parts, n = [], 0
    for model in raw.models(RAW):
        said = []
        for protocol in PROTOCOLS:
            measured = raw.measured(RAW.format(model), protocol)
            need(measured, ROW)
            n = measured.n
            same = measured.compare(ROW, measured.full).words == SAME
            held.setdefault(f"no loss under protocol {protocol}", {})[model] = same and measured.good(ROW)
            said.append(f"{protocol} {within(measured.of_full(ROW))}")
            parts += _beside(measured, f"{model}, protocol {protocol}")
        shrink = measured.shrink(ROW)
        texts[model] = f"{', '.join(said)} at {shrink.mean:.2f}x fewer bytes in BF16"
    parts += _dropped(raw)
    words = judge(held)
    return Finding(
        f"`{ROW}`, % of full: {listed(texts, n)}",
        f"{PART}: no loss; memory and speed not measured" if words == HOLDS else words,
        "Neighbouring tokens of these pictures foretell each other badly, channels of one token well; text stays as it "
        "is. Memory and tokens per second are not measured: here a capsule is opened before the cloud decodes."
        if words == FAILS
        else "Memory and tokens per second are not measured: here a capsule is opened before the cloud decodes.",
        f"with 40 % of the visual tokens' numbers in 16 bit no difference to the full cache is shown and {KEPT:.0%} of "
        "its accuracy is reached",
        tuple(parts),
    )


def _beside(measured: Measured, where: str) -> list[str]:
    """Variants and eviction beside the capsule: ratios of KL and differences of accuracy."""
    rows = {**VARIANTS, "evicting as many": EVICTED[CLAIMED], "evicting for a proxy": f"{EVICTED[CLAIMED]} proxy"}
    found = []
    for name, row in rows.items():
        if row not in measured.points:
            continue
        against, kl = measured.compare(ROW, row), measured.kl_ratio(ROW, row)
        more = "" if kl is None else f", KL {interval(kl, 2)} times"
        found.append(f"{where}, against {name}: points {percent(against.difference)} ({against.words}){more}")
    return found


def _dropped(raw: Raw) -> list[str]:
    """What a cache of 40 % of the tokens takes and how fast it decodes, however it came to be so small."""
    if not raw.has(DECODE):
        return []
    benched = raw.json(DECODE)
    fastest, (low, high) = max(((ratio, ends) for _, ratio, ends in speeds(benched, CLAIMED)), key=lambda x: x[0])
    lighter = max(memory(benched, CLAIMED).values())
    return [
        f"of a cache of 40 % of the tokens, by dropping the others: up to {fastest:.2f}x [{low:.2f}, {high:.2f}] the "
        f"tokens per second on one CPU core, the full cache {lighter:.2f}x as large"
    ]
