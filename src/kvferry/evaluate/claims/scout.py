"""Claims 11 and 12: one model's choice for another, and what the positions cost."""

from __future__ import annotations

from collections.abc import Iterable

from kvferry.evaluate.claims.base import Finding, MissingError, Raw, judge, within
from kvferry.evaluate.codec_rows import Comparison, corrected
from kvferry.evaluate.codec_tables import p_head, p_text, percent
from kvferry.evaluate.scout import read
from kvferry.evaluate.scout_rows import Scouted
from kvferry.evaluate.stats import Estimate
from kvferry.evaluate.tables import interval

TRIAL = "scout-{}.jsonl"
SCORER = "q2c"
OVERLAPS = {0.75: 0.82, 0.5: 0.64, 0.25: 0.45}
"""The least that the sources report, by kept share."""
KEPT = 0.994
LIST, SOURCE = "16-bit list", 0.75
"""How the sources send positions, and how many of them."""


def overlap(raw: Raw) -> Finding:
    """Claim 11."""
    found = _trial(raw)
    rows = {share: f"{SCORER}@{share:g}" for share in OVERLAPS}
    shared = {share: found.overlap(row) for share, row in rows.items()}
    kept = {share: found.share(f"{row} edge", f"{row} own") for share, row in rows.items()}
    parts = []
    for scorer in found.trial.scorers:
        names = [row for row in found.rankings if row.startswith(f"{scorer}@")]
        against = [found.compare(f"{row} edge", f"{row} own") for row in names]
        for row, x in zip(names, corrected(against), strict=True):
            points = f"{percent(x.difference)} points, {p_head(len(names))} {p_text(x.p)}: {x.words}"
            parts.append(
                f"`{row}`: overlap {interval(found.overlap(row), 2)} (by chance {found.chance(row).mean:.2f}); the "
                f"edge's choice minus the cloud's own {points}"
            )
    parts.append(f"% of full: {', '.join(f'{row} own {percent(_full(found, row))}' for row in rows.values())}")
    return Finding(
        f"Q2C at 75 / 50 / 25 %, {found.trial.edge} for {found.trial.cloud}, protocol A: overlap "
        f"{_listed(shared.values())} %; right answers {_listed(kept.values())} % of those by the cloud's own choice; "
        f"n = {found.n}",
        judge({
            "overlap": {f"{share:.0%}": shared[share].high >= least for share, least in OVERLAPS.items()},
            "answers": {f"{share:.0%}": kept[share].high >= KEPT for share in OVERLAPS},
        }),
        "At 75 and 50 % the sets agree little more than by chance, yet no loss of answers is shown: all text stays, "
        "and the question's tokens hold much of the answer already."
        if all(x.difference.low <= 0 <= x.difference.high for x in (_compare(found, row) for row in rows.values()))
        else "The edge's choice costs answers.",
        "overlap reaches the least that the sources report, answers 99.4 % of those by the cloud's own choice, each by "
        "its interval",
        tuple(parts),
    )  # fmt: skip


def payload(raw: Raw) -> Finding:
    """Claim 12."""
    found = _trial(raw)
    row = f"{SCORER}@{SOURCE:g}"
    sent, shrink, listed_as = found.sent(row), found.shrink(row), found.shrink(row, LIST)
    parts = [
        f"`{x}`: {interval(found.sent(x), 1)} bytes with message and checksum, {interval(found.shrink(x), 0)}x; as a "
        f"list of 16-bit numbers {found.bytes_as(x, LIST).mean():.0f}"
        for x in found.rankings
    ]
    as_list = float(found.bytes_as(row, LIST).mean())
    return Finding(
        f"Q2C at 75 %, edge to cloud: {within(sent, by=1)} bytes, {within(shrink, by=1, digits=0)}x smaller than BF16; "
        f"as the sources' list {as_list:.0f} bytes, {within(listed_as, by=1, digits=0)}x; n = {found.n}",
        judge({"": {"edge": sent.high <= as_list}}),
        "The ratio is the model's, whose cache takes 57,344 bytes a token there; a position takes fewer bytes here.",
        "the positions, message and checksum included, take no more than two bytes each, as in the sources",
        tuple(parts),
    )


def _trial(raw: Raw) -> Scouted:
    name = TRIAL.format("edge")
    if not raw.has(name):
        raise MissingError(f"there is no {raw.folder / name}")
    head, lines = read(raw.folder / name)
    raw.heads[name] = head
    found = Scouted(head, lines)
    absent = [x for x in OVERLAPS if f"{SCORER}@{x:g}" not in found.rankings]
    if absent:
        raise MissingError(f"{name} holds no {SCORER}@{absent[0]:g}")
    return found


def _compare(found: Scouted, row: str) -> Comparison:
    return found.compare(f"{row} edge", f"{row} own")


def _full(found: Scouted, row: str) -> Estimate:
    return found.share(f"{row} own", "full")


def _listed(found: Iterable[Estimate]) -> str:
    return " / ".join(map(within, found))
