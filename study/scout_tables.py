"""The section of RESULTS.md on mode scout: the sources' claims 11 and 12, and the figures that decide them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvferry.evaluate.tables import PROTOCOLS, interval, markdown
from kvferry.modes.ranking import DEFAULT_SCORER
from kvferry.selection import SCORERS
from kvferry.statistics import Estimate, mean_interval
from study.codec_tables import TESTS, p_text, percent, times
from study.page import Places
from study.scout import read
from study.scout_rows import FORMS, Scouted

CLAIMED_OVERLAP = {0.75: (0.82, 0.84), 0.5: (0.64, 0.70), 0.25: (0.45, 0.59)}
CLAIMED_SHARE = 0.994
"""Of the quality of the cloud's own selection, for 7B choosing for 14B."""
CLAIMED_RATIO = 28_800
CLAIMED_TOKEN_BYTES = 57_344
"""BF16 cache of one token of the sources' 7B model: 28 layers, 4 heads of 128 channels, keys and values."""
SOURCES_SCORER = "q2c"

HOLDS, OPEN, FAILS = "holds", "not decided", "fails"


def claim_overlap(found: Scouted, scorer: str) -> tuple[str, str]:
    """Verdict and words on the first half of claim 11: no retention may lie below the sources' range."""
    parts, below = [], []
    for share, (low, high) in CLAIMED_OVERLAP.items():
        row = f"{scorer}@{share:g}"
        if row not in found.rankings:
            continue
        overlap = found.overlap(row)
        where = "below" if overlap.high < low else "above" if overlap.low > high else "inside"
        below.append(where == "below")
        parts.append(
            f"{percent(overlap)} % at {share:.0%} ({where} {100 * low:.0f}-{100 * high:.0f}; chance gives "
            f"{found.chance(row).mean:.0%})"
        )
    verdict = OPEN if not parts else FAILS if any(below) else HOLDS
    return verdict, "; ".join(parts)


def claim_share(found: Scouted, scorer: str) -> tuple[str, str]:
    """Verdict and words on the second half of claim 11: the edge's choice is worth 99.4 %."""
    parts, verdicts = [], []
    for row in (row for row in found.rankings if row.partition("@")[0] == scorer):
        kept = float(row.partition("@")[2])
        share = found.share(f"{row} edge", f"{row} own")
        verdict = HOLDS if share.mean >= CLAIMED_SHARE else OPEN if share.high >= CLAIMED_SHARE else FAILS
        if kept in CLAIMED_OVERLAP:
            verdicts.append(verdict)
        beyond = "" if kept in CLAIMED_OVERLAP else ", where the sources did not measure"
        parts.append(f"{percent(share)} % at {kept:.0%} ({verdict}{beyond})")
    whole = next((verdict for verdict in (FAILS, OPEN) if verdict in verdicts), HOLDS)
    return whole if verdicts else OPEN, "; ".join(parts)


def claim_ratio(found: Scouted) -> tuple[str, str]:
    """Verdict and words on claim 12: somewhere the positions are 28,800 times smaller than the cache."""
    best = max(found.rankings, key=lambda row: found.shrink(row).mean)
    worst = min(found.rankings, key=lambda row: found.shrink(row).mean)
    top = found.shrink(best)
    verdict = HOLDS if top.low >= CLAIMED_RATIO else OPEN if top.high >= CLAIMED_RATIO else FAILS
    cached = mean_interval([line.bf16_bytes for line in found.lines]).mean
    bits = [8 * found.sent(row).mean / (8 * found.bound().mean()) for row in (best, worst)]
    wide = [f"{8 * CLAIMED_TOKEN_BYTES / x:,.0f}" for x in bits]
    words = (
        f"between {ratio(found.shrink(worst))} (`{worst}`) and {ratio(top)} (`{best}`), of a BF16 cache of "
        f"{cached:,.0f} bytes. Such a ratio measures the model first: the sources' is about the "
        f"{CLAIMED_TOKEN_BYTES:,} bytes that one token takes in their model over the 2 bytes of its index. The "
        f"{bits[0]:.2f} to {bits[1]:.2f} bits that a visual token's place takes here, over all of them, would be "
        f"{wide[1]} to {wide[0]} times less than their cache in a model of that width (by formula, not measured)"
    )
    return verdict, words


def ratio(a: Estimate) -> str:
    """A ratio of bytes with its interval."""
    return f"{times(a.mean)} [{times(a.low)}, {times(a.high)}]"


def claims(found: Scouted) -> list[str]:
    """Claims 11 and 12 with their verdicts."""
    rival = default_scorer()
    lines = []
    for title, claim in (
        ("Claim 11, overlap (82-84 % at 75 %, 64-70 % at 50 %, 45-59 % at 25 %)", claim_overlap),
        (
            "Claim 11, quality (99.4 % of the cloud's own selection for a near pair, 15-18 % lost for a far one)",
            claim_share,
        ),
    ):
        for scorer, whose in ((SOURCES_SCORER, "the sources' scorer"), (rival, "mode scout's default")):
            if scorer in found.trial.scorers:
                verdict, words = claim(found, scorer)
                lines.append(f"* {title}: **{verdict}** here with `{scorer}` ({whose}): {words}.")
    verdict, words = claim_ratio(found)
    lines.append(f"* Claim 12 (336 bytes against 9.7 MB, {CLAIMED_RATIO:,}x): **{verdict}** here: {words}.")
    return lines


def default_scorer() -> str:
    """The name of mode scout's scorer."""
    return next(name for name, kind in SCORERS.items() if isinstance(DEFAULT_SCORER, kind))


def findings(found: Scouted) -> list[str]:
    """What the claims do not ask: whether the edge should have answered itself, and the bound on the bytes."""
    lines = []
    beaten = [row for row in found.rankings if found.compare(f"{row} edge", "alone").difference.low > 0]
    best = max(found.rankings, key=lambda row: (found.accuracy(f"{row} edge").mean, -found.sent(row).mean))
    against, ceiling = found.compare(f"{best} edge", "alone"), found.compare(f"{best} edge", "full")
    lines.append(
        f"* Against the edge's own answer: the cloud is right more often on the edge's positions in {len(beaten)} of "
        f"{len(found.rankings)} rows. The best of them (on these very questions), `{best}`: "
        f"{percent(against.difference)} points (p {p_text(against.p)}: {against.words}); against the cloud's full "
        f"cache {percent(ceiling.difference)} points (p {p_text(ceiling.p)}: {ceiling.words})."
    )
    forms = min(found.within(row, framed=False) for row in found.rankings)
    framed = [found.within(row, framed=True) for row in found.rankings]
    lines.append(
        f"* A bit per visual token ({found.bound().mean():.1f} bytes): the smallest form keeps to it in {forms:.0%} of "
        f"the questions of every row; with message and checksum, in {min(framed):.0%} (the row that does worst) to "
        f"{max(framed):.0%}."
    )
    picture = mean_interval([line.image_bytes for line in found.lines])
    lines.append(
        f"* Positions are not all that crosses: the question does too, and the picture, once "
        f"({picture.mean:,.0f} bytes as JPEG of quality 90). And the cloud prefills all of it: mode `image` with the "
        "picture held sends no positions and answers from the full cache, the ceiling here. What scout saves is the "
        "cloud's memory and decoding, not bytes."
    )
    return lines


def ends_table(found: Scouted) -> str:
    """The rows without a choice of tokens."""
    rows = []
    for row, what in found.ENDS.items():
        against = found.compare(row, "full")
        tail = ["", ""] if row == "full" else [percent(against.difference), f"{p_text(against.p)}: {against.words}"]
        rows.append([what, interval(found.accuracy(row)), *tail])
    return markdown(["cloud answers from", "accuracy", "minus ceiling: points", "p"], rows, left=(3,))


def choice_table(found: Scouted, rows: Sequence[str]) -> str:
    """Overlap, and answers from the cloud's own choice, the edge's and a random one."""
    table = []
    for row in rows:
        against = found.compare(f"{row} edge", f"{row} own")
        table.append(
            [
                f"`{row}`",
                percent(found.overlap(row)),
                f"{100 * found.chance(row).mean:.1f}",
                *(interval(found.accuracy(f"{row} {whose}")) for whose in ("own", "edge", "random")),
                percent(against.difference),
                f"{p_text(against.p)}: {against.words}",
            ]
        )
    head = [
        "ranking@kept",
        "overlap %",
        "by chance %",
        "own choice",
        "the edge's choice",
        "random",
        "edge's minus own: points",
    ]
    return markdown([*head, "p"], table, left=(7,))


def against_table(found: Scouted, rows: Sequence[str]) -> str:
    """Jaccard, and the edge's choice against everything else."""
    table = []
    for row in rows:
        cells = [f"`{row}`", percent(found.jaccard(row)), percent(found.share(f"{row} edge", f"{row} own"))]
        for other in ("full", "alone", f"{row} random"):
            against = found.compare(f"{row} edge", other)
            cells += [percent(against.difference), f"{p_text(against.p)}: {against.words}"]
        table.append(cells)
    head = ["ranking@kept", "Jaccard %", "% of own choice's accuracy", "minus full cache: points", "p"]
    return markdown([*head, "minus edge alone: points", "p", "minus random: points", "p"], table, left=(4, 6, 8))


def bytes_table(found: Scouted, rows: Sequence[str]) -> str:
    """The positions as sent, and in every form."""
    table = []
    for row in rows:
        alone = (f"{found.bytes_as(row, form).mean():.1f}" for form in FORMS)
        shrink = [ratio(found.shrink(row)), ratio(found.shrink(row, "16-bit list"))]
        table.append([f"`{row}`", interval(found.sent(row), 1), *alone, *shrink])
    forms = ("bitmap", "runs", "range-coded", "Elias-Fano", "16-bit list")
    head = ["ranking@kept", "as sent", *forms, "BF16 cache / sent", "BF16 cache / 16-bit list"]
    return markdown(head, table)


def render(results: Path, places: Places, title: str) -> str:
    """The section of one raw file; writes the page with every row."""
    head, lines = read(results)
    found = Scouted(head, lines)
    page = places.detail(results)
    note = [_provenance(head, found), "", f"Protocol A: {PROTOCOLS['A']}. {_how(found)}", ""]
    bytes_note = (
        "Bytes of the positions, mean over questions. As sent: the smallest of bitmap, runs and range-coded bits, with "
        "its message and checksum; the other columns are the forms alone. Elias-Fano and the sources' 16-bit list are "
        "not on the wire here; their sizes follow from the numbers of tokens. "
        f"A bit per visual token would be {found.bound().mean():.1f} bytes."
    )
    default = [row for row in found.rankings if row.partition("@")[0] == default_scorer()] or list(found.rankings)
    text = [f"## {title}", "", *note, *claims(found), *findings(found), "", ends_table(found), ""]
    text += [choice_table(found, found.rankings), "", bytes_note, "", bytes_table(found, default), ""]
    text += [
        f"Jaccard, the edge's choice against everything else, bytes of every row: [{page.name}]({places.link(page)})",
        "",
    ]
    full = [f"# {title}", "", *note, "## The edge's choice against the rest", "", against_table(found, found.rankings)]
    full += ["", "## Bytes", "", bytes_note, "", bytes_table(found, found.rankings), ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(full))
    return "\n".join(text)


def _how(found: Scouted) -> str:
    taught = (
        " Training taught `testbed/edge` and `testbed/cloud` where to look (see their model cards), which favours "
        "agreement; `testbed/control` was not taught."
    )
    return (
        f"n = {found.n} questions, the same for every row (paired). Kept are all text tokens and a share of the visual "
        "ones, the same in all layers and heads; overlap is |A and B| / k of the edge's and the cloud's own choice, by "
        "chance it would be k / n. Both models see the picture as it is; the cloud's answer is judged by feeding the "
        f"true one. {TESTS}.{taught if found.trial.edge.startswith('testbed/') else ''}"
    )


def _provenance(head: dict[str, Any], found: Scouted) -> str:
    indices = [line.index for line in found.lines]
    trial = found.trial
    kinds = f" of the kinds {', '.join(trial.kinds)}" if trial.kinds else ""
    return (
        f"Edge `{trial.edge}` (fingerprint `{head['edge_fingerprint'][:12]}`), cloud `{trial.cloud}` "
        f"(`{head['fingerprint'][:12]}`), {head['dtype']}, split `{trial.split}`, questions {min(indices)} to "
        f"{max(indices)}{kinds}. Made by `{head['command']}` at commit `{head['commit'][:12]}"
        f"{'+changes' if head['commit'].endswith('+changes') else ''}`, torch {head['torch']}, transformers "
        f"{head['transformers']}, {head['machine']}."
    )
