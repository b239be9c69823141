"""Claims 11 and 12: one model's choice for another, and what the positions cost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvferry.evaluate.measured import Comparison, corrected
from kvferry.evaluate.tables import interval
from kvferry.statistics import Estimate
from study.claims.base import Finding, MissingError, Raw, judge, within
from study.codec_tables import p_head, p_text, percent
from study.scout import read
from study.scout_rows import Scouted

TRIAL = "scout-{}.jsonl"
EDGES = ("edge", "control")
"""Models that choose for the cloud's. Training taught the first, as it taught the cloud's, where to look."""
SCORER = "q2c"
OVERLAPS = {0.75: 0.82, 0.5: 0.64, 0.25: 0.45}
"""The least that the sources report, by kept share."""
KEPT = 0.994
LIST, SOURCE = "16-bit list", 0.75
"""How the sources send positions, and how many of them."""


def overlap(raw: Raw) -> Finding:
    """Claim 11."""
    pairs = {edge: _trial(raw, edge) for edge in raw.models(TRIAL, EDGES)}
    shared, kept = ({(edge, share): measure(found, f"{SCORER}@{share:g}") for edge, found in pairs.items()
                     for share in OVERLAPS} for measure in (Scouted.overlap, _kept))  # fmt: skip
    texts = [
        f"{found.trial.edge} for {found.trial.cloud}: overlap {_listed(shared[edge, x] for x in OVERLAPS)} %; right "
        f"answers {_listed(kept[edge, x] for x in OVERLAPS)} % of those by the cloud's own choice; n = {found.n}"
        for edge, found in pairs.items()
    ]
    costs = [
        edge for edge, found in pairs.items()
        if any(_compare(found, f"{SCORER}@{share:g}").difference.high < 0 for share in OVERLAPS)
    ]  # fmt: skip
    return Finding(
        f"Q2C at 75 / 50 / 25 %, protocol A: {'. '.join(texts)}",
        judge({
            **{f"overlap at {share:.0%}": {edge: shared[edge, share].high >= least for edge in pairs}
               for share, least in OVERLAPS.items()},
            "answers": {edge: all(kept[edge, share].high >= KEPT for share in OVERLAPS) for edge in pairs},
        }),
        f"The choice of {' and '.join(costs)} costs answers." if costs else
        "The sets agree little more than by chance, or less, at 75 and 50 %, yet no loss of answers is shown: all text "
        "stays, and the question's tokens hold much of the answer already.",
        "overlap reaches the least that the sources report, answers 99.4 % of those by the cloud's own choice, each by "
        "its interval",
        tuple(part for found in pairs.values() for part in _parts(found)),
    )  # fmt: skip


def _parts(found: Scouted) -> Iterator[str]:
    """Every scorer of one pair of models."""
    for scorer in found.trial.scorers:
        names = [row for row in found.rankings if row.startswith(f"{scorer}@")]
        against = [found.compare(f"{row} edge", f"{row} own") for row in names]
        for row, x in zip(names, corrected(against), strict=True):
            points = f"{percent(x.difference)} points, {p_head(len(names))} {p_text(x.p)}: {x.words}"
            yield (
                f"{found.trial.edge}, `{row}`: overlap {interval(found.overlap(row), 2)} (by chance "
                f"{found.chance(row).mean:.2f}); the edge's choice minus the cloud's own {points}"
            )
    own = ", ".join(f"{SCORER}@{x:g} own {percent(found.share(f'{SCORER}@{x:g} own', 'full'))}" for x in OVERLAPS)
    yield f"{found.trial.edge}, % of full: {own}"


def payload(raw: Raw) -> Finding:
    """Claim 12."""
    found = _trial(raw, EDGES[0])
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


def _trial(raw: Raw, edge: str) -> Scouted:
    name = TRIAL.format(edge)
    if not raw.has(name):
        raise MissingError(f"there is no {raw.folder / name}")
    head, lines = read(raw.folder / name)
    raw.heads[name] = head
    found = Scouted(head, lines)
    absent = [x for x in OVERLAPS if f"{SCORER}@{x:g}" not in found.rankings]
    if absent:
        raise MissingError(f"{name} holds no {SCORER}@{absent[0]:g}")
    return found


def _kept(found: Scouted, row: str) -> Estimate:
    return found.share(f"{row} edge", f"{row} own")


def _compare(found: Scouted, row: str) -> Comparison:
    return found.compare(f"{row} edge", f"{row} own")


def _listed(found: Iterable[Estimate]) -> str:
    return " / ".join(map(within, found))
