"""The second column: claims that need no picture, put to SmolLM2-135M on SQuAD's paragraphs, by the same rules.

"Right" is F1 of words; where that moves too little to tell, KL along the full cache's answer stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kvferry.evaluate.measured import Measured
from kvferry.evaluate.records import Line
from kvferry.evaluate.tables import interval
from kvferry.statistics import TOO_FEW, holm, mean_interval
from study.claims.base import (
    FAILS,
    HOLDS,
    UNTESTABLE,
    Finding,
    MissingError,
    Raw,
    judge,
    need,
    within,
)  # fmt: skip
from study.claims.codecs import (
    BYTES,
    DROP,
    KEPT,
    LITTLE,
    LITTLE_AGAIN,
    LOSSLESS,
    NEARLY,
    RANKS,
    RESTORED,
    TOP_ENERGY,
)  # fmt: skip
from study.claims.selection import NAMES, ORDER, SURE
from study.codec_tables import compared, delta_pairs, p_head, p_text, percent, svd_points
from study.squad.records import read

NAME = "SmolLM2-135M, SQuAD"
SCORERS, CODECS, CODERS, DIAGNOSIS = "scorers-512.jsonl", "codecs-512.jsonl", "coders-512.jsonl", "diagnose-int4.json"
PROTECTED, MIXED = "protected.json", "mixed.json"
MAKE = "make results-smol"
ENOUGH = 30
"""Of fewer questions figures are given and no verdict: intervals are too wide to fail a claim by."""


class SquadRaw(Raw):
    """Raw results of :mod:`study.squad`."""

    def _read_lines(self, name: str) -> tuple[dict[str, Any], list[Line]]:
        self._check(name)
        head, records = read(self.folder / name)
        return head, [x.line() for x in records]


def order(raw: Raw) -> Finding:
    """Claim 5."""
    measured = raw.measured(SCORERS)
    rows = [f"{name}@0.25|bf16" for name in ORDER]
    need(measured, *rows)
    steps = list(pairwise(rows))
    against = [measured.compare(a, b) for a, b in steps]
    ps = holm([x.p for x in against])
    held = all(x.difference.low > 0 and p < SURE for x, p in zip(against, ps, strict=True))
    best = min((p.name for p in measured.points.values() if "@0.25" in p.name), key=lambda r: _kl(measured, r))
    parts = []
    for (one, two), (a, b), found, p in zip(pairwise(ORDER), steps, against, ps, strict=True):
        ratio = measured.kl_ratio(a, b)
        kl = "" if ratio is None else f"; KL {interval(ratio, 2)} times"
        points = f"{percent(found.difference)} points of F1, {p_head(len(ps))} {p_text(p)}: {found.words}{kl}"
        parts.append(f"{NAMES[one]} to {NAMES[two]}: {points}")
    return Finding(
        f"{' / '.join(NAMES.values())} at 25 %, % of the full cache's F1: "
        f"{' / '.join(within(measured.of_full(r)) for r in rows)}; KL {_kls(measured, rows)}{_n(measured)}",
        _verdict(measured, HOLDS if held else FAILS),
        f"By KL `{best.partition('@')[0]}` is nearest to the full cache of all scorers at 25 %.",
        f"each step has more F1, p (signed ranks, Holm over {len(ps)}) below {SURE}",
        tuple(parts),
    )


def bits(raw: Raw) -> Finding:
    """Claim 6."""
    measured = raw.measured(CODECS)
    rows = [f"full|int{bits}" for bits in (8, 4, 3, 2)]
    need(measured, *rows)
    shares = [measured.of_full(row) for row in rows]
    held = {
        "INT8": {"": shares[0].low >= LOSSLESS},
        "INT4": {"": shares[1].low >= NEARLY},
        "INT3": {"": shares[2].low <= LITTLE <= shares[2].high},
        "INT2": {"": shares[3].low <= LITTLE_AGAIN <= shares[3].high},
    }
    return Finding(
        f"INT8 / 4 / 3 / 2, % of the full cache's F1: {' / '.join(map(within, shares))}; KL {_kls(measured, rows)}"
        f"{_n(measured)}",
        _verdict(measured, judge(held)),
        f"Where an interval is wide F1 says little; KL grows {_times(measured, rows[1], rows[0])} from 8 bits to 4, "
        f"then {_times(measured, rows[2], rows[1])} to 3 and {_times(measured, rows[3], rows[2])} to 2.",
        "INT8, INT4: the whole interval reaches 99.4 and 96 %; INT3, INT2: the interval holds the sources' figure",
        tuple(f"`{p.name}`: {_told(measured, p.name)}" for p in measured.points.values() if p.whole and p.bits),
    )


def protection(raw: Raw) -> Finding:
    """Claim 7."""
    found, measured = raw.json(DIAGNOSIS), raw.measured(CODECS)
    row, plain = _profile(measured, PROTECTED), "full|int4"
    need(measured, plain)
    kl = np.array(found["kl"])
    own = kl[:, 1:].mean(0)
    first = found["order"][0]
    share, losses = own[first] / own.sum(), found["losses"]
    alone = [losses[1 + layer] for layer in found["order"][:3]]
    restored = measured.of_full(row)
    verdict = UNTESTABLE
    if found["pattern"] == "concentrated":
        verdict = HOLDS if restored.low >= RESTORED else FAILS
    elif found["pattern"] == "distributed":
        less = measured.kl_ratio(row, plain)
        verdict = HOLDS if less is not None and less.high > 0.5 else FAILS
    worst = ", ".join(f"{layer} ({own[layer]:.3f})" for layer in found["order"][:5])
    return Finding(
        f"INT4 changes {losses[0]:.0%} of the answers (KL {kl[:, 0].mean():.2f}), the three worst layers alone "
        f"{' / '.join(f'{x:.0%}' for x in alone)}: {found['pattern']}; n = {found['n']} validation questions. With "
        f"layer {first} at 16 bits {_told(measured, row)}, without {_told(measured, plain)}{_n(measured)}",
        _verdict(measured, verdict),
        f"The worst layer, {first}, has {share:.0%} of the sum of the layers' own KL; "
        + ("there is no bottleneck to protect, and one layer does not help." if found["pattern"] == "distributed"
           else "the claim is about damage in few layers."),
        "concentrated damage: the protected layer brings back 95 % of F1 (whole interval); distributed: it does not "
        "halve KL (the interval reaches above half)",
        (f"layers by KL of their own, nats: {worst}; all {len(own)} together add up to {own.sum():.3f}",),
    )  # fmt: skip


def delta(raw: Raw) -> Finding:
    """Claim 8."""
    measured = raw.measured(CODERS)
    pairs = delta_pairs(measured)
    if not pairs:
        raise MissingError("the results hold no pair of delta:10 and delta:0; sweep both")
    worse, parts = [], []
    for (what, a, b), against in zip(pairs, compared(measured, pairs), strict=True):
        size, kl = measured.size_ratio(a.name, b.name), measured.kl_ratio(a.name, b.name)
        more = "" if kl is None else f", KL {interval(kl, 2)} times"
        points = f"F1 {percent(against.difference)} points ({p_text(against.p)}): {against.words}"
        parts.append(f"{what}, `{a.name}` to `{b.name}`: {interval(size, 2)} times the bytes{more}, {points}")
        worse.append(size.low > 1 and against.difference.low <= 0)
    return Finding(
        f"{parts[0]}{_n(measured)}",
        _verdict(measured, HOLDS if all(worse) else FAILS),
        "Differences from an anchor token are held against the numbers themselves, by the same range coder.",
        "in the same steps more bytes without more F1",
        tuple(parts[1:]),
    )


def spectrum(raw: Raw) -> Finding:
    """Claim 9."""
    measured, found = raw.measured(CODERS), raw.json(DIAGNOSIS)
    points = svd_points(measured)
    if len(points) < 2:
        raise MissingError("the results hold no row svd:R at two ranks; sweep them")
    falls = {(a.rank, b.rank): measured.compare(b.name, a.name).difference for a, b in pairwise(points)}
    worst = min(falls, key=lambda ranks: falls[ranks].mean)
    full = measured.accuracy(measured.full).mean
    sides = [mean_interval(x) for x in np.array(found["energy"]).mean(2).T]
    held = {
        "a cliff": {"": falls[worst].high < DROP * full},
        "between rank 64 and 32": {"": RANKS in falls and falls[RANKS].high < DROP * full},
        "energy": {"": any(x.low >= TOP_ENERGY for x in sides)},
    }
    return Finding(
        f"rank {' / '.join(str(p.rank) for p in points)} of 192, % of the full cache's F1: "
        f"{' / '.join(within(measured.of_full(p.name)) for p in points)}; KL {_kls(measured, [p.name for p in points])}"
        f"{_n(measured)}; top 5 % of singular values of keys / values hold, %: {' / '.join(map(within, sides))} "
        f"(n = {found['n']})",
        _verdict(measured, judge(held)),
        f"The largest fall is from rank {worst[0]} to {worst[1]}: {percent(falls[worst])} points of F1, KL "
        f"{_times(measured, f'full|svd:{worst[1]}', f'full|svd:{worst[0]}')}.",
        "a cliff is a fall of over 20 % of the full cache's F1 (whole interval) from one measured rank to the next; "
        "energy: keys or values reach the sources' share",
        tuple(f"`{p.name}`: {_told(measured, p.name)}" for p in points),
    )  # fmt: skip


def retention(raw: Raw) -> Finding:
    """Claim 10."""
    measured = raw.measured(CODECS)
    row, whole, other = "q2c@0.75|int4", "full|int4", "snapkv@0.75|int4"
    need(measured, row, whole, other)
    share, size = measured.of_full(row), measured.bytes[row] / measured.bf16
    return Finding(
        f"`{row}` {_told(measured, row)} at {size:.1%} of the bytes (claimed: {BYTES:.2%}); `{whole}` "
        f"{_told(measured, whole)}; `{other}` {_told(measured, other)}{_n(measured)}",
        _verdict(measured, HOLDS if share.high >= KEPT else FAILS),
        f"Of KL {_kl(measured, row):.2f}, INT4 alone has {_kl(measured, whole):.2f}.",
        "the interval reaches 96 %",
        tuple(f"`{p.name}`: {_told(measured, p.name)} at {measured.bytes[p.name] / measured.bf16:.1%} of the bytes"
              for p in measured.points.values() if p.base in ("q2c", "snapkv") and p.bits),
    )  # fmt: skip


def steps(raw: Raw) -> Finding:
    """Claim 13."""
    measured = raw.measured(CODECS)
    eight, four, mixed = "full|int8", "full|int4", _profile(measured, MIXED)
    need(measured, eight, four)
    over, under = measured.compare(mixed, four), measured.compare(eight, mixed)
    p = holm([over.p, under.p])
    held = {
        "INT8 lossless": {"": measured.of_full(eight).low >= LOSSLESS},
        "mixed above INT4": {"": over.difference.low > 0 and p[0] < SURE},
        "mixed below INT8": {"": under.difference.low > 0 and p[1] < SURE},
    }
    rows = (measured.full, eight, mixed, four)
    kl = [measured.kl_ratio(four, mixed), measured.kl_ratio(mixed, eight)]
    ratios = [] if None in kl else [
        f"KL of INT4 by that of mixed {interval(kl[0], 2)}, of mixed by that of INT8 {interval(kl[1], 2)}"  # type: ignore[arg-type]
    ]  # fmt: skip
    return Finding(
        "full / INT8 / mixed (the worst quarter of the layers at 8 bits) / INT4, % of the full cache's F1 at the share "
        "of BF16 bytes: "
        + " / ".join(f"{within(measured.of_full(r))} at {measured.bytes[r] / measured.bf16:.2f}" for r in rows)
        + _n(measured),
        _verdict(measured, judge(held)),
        f"By KL the steps are there: {_kls(measured, rows[1:])}.",
        "INT8 keeps 99.4 % (whole interval); mixed has more F1 than INT4 and less than INT8 (both p below 0.05, Holm)",
        tuple(ratios),
    )


FINDINGS: Mapping[int, Callable[[Raw], Finding]] = {
    5: order, 6: bits, 7: protection, 8: delta, 9: spectrum, 10: retention, 13: steps,
}  # fmt: skip


def raw_in(folder: Path) -> Raw:
    """The raw results beside the small models'."""
    return SquadRaw(folder / "smollm2")


def _profile(measured: Measured, name: str) -> str:
    row = next((row for row in measured.names if row.startswith("full|mixed@") and row.endswith(name)), None)
    if row is None:
        raise MissingError(f"the results hold no row full|mixed@{name}; sweep it too")
    return row


def _verdict(measured: Measured, verdict: str) -> str:
    return verdict if measured.n >= ENOUGH else f"{TOO_FEW} for a verdict"


def _kl(measured: Measured, row: str) -> float:
    found = measured.kl(row)
    return float("nan") if found is None else found.mean


def _kls(measured: Measured, rows: Any) -> str:
    return " / ".join(f"{_kl(measured, row):.3g}" for row in rows)


def _times(measured: Measured, row: str, other: str) -> str:
    ratio = measured.kl_ratio(row, other)
    return "from nothing" if ratio is None else f"{ratio.mean:.1f} times"


def _told(measured: Measured, row: str) -> str:
    return f"{within(measured.of_full(row))} % of F1, KL {_kl(measured, row):.3g}"


def _n(measured: Measured) -> str:
    return f"; protocol A, 512 tokens, n = {measured.n}"
