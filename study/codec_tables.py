"""Sections of RESULTS.md that compare codecs, and a page with every row beside each."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kvferry.codecs import Delta, Integer, Mixed, codec_text
from kvferry.evaluate.measured import KEPT, SAME, Comparison, Measured, Point, corrected
from kvferry.evaluate.records import Line, Outcome, Protocol, read
from kvferry.evaluate.tables import PROTOCOLS, interval, kind_table, markdown, provenance_note, proxy_note
from kvferry.statistics import Estimate, holm
from study.codec_figures import draw_codecs
from study.page import Places

BYTES = (
    "Bytes are whole bitstreams (header, positions and framing included) as means, without the framing of gRPC and TCP"
)
TESTS = (
    "Intervals are 95 %, by resampling questions, and paired; p is McNemar's (exact, two-sided), of KL that of "
    "Wilcoxon's signed ranks, corrected by Holm's method for as many comparisons as stand beside its name; "
    '"no difference shown" where the interval, which is of one comparison by itself, holds 0 (of a ratio: 1); an '
    "interval without width comes of rows that do alike on every question"
)
NEAR = 1.25
"""Ratio of bytes up to which two rows count as equally large."""
LOSSLESS = ("zstd", "range")
"""Stages behind packed integers."""

Pair = tuple[str, Point, Point]
"""What the comparison is, a row, and the row it is held against."""


def scaled(a: Estimate, by: float) -> Estimate:
    """In another unit."""
    return Estimate(a.mean * by, a.low * by, a.high * by, a.n)


def percent(a: Estimate) -> str:
    """A share and its interval, or a difference of shares, in percent."""
    return interval(scaled(a, 100), 1)


def times(a: float) -> str:
    """A ratio of bytes."""
    return f"{a:,.0f}x" if a >= 100 else f"{a:.1f}x"


def p_text(p: float) -> str:
    """A probability, as far as it matters."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def p_head(comparisons: int) -> str:
    """Of a column of probabilities."""
    return f"p (Holm, {comparisons})"


def kl_text(a: Estimate | None) -> str:
    """Nats, or nothing where they were not measured."""
    return "" if a is None else interval(a, 5)


def rows_table(
    measured: Measured,
    points: Sequence[Point],
    first: str = "row",
    name: Callable[[Point], object] = lambda point: f"`{point.name}`",
    extra: Mapping[str, Callable[[Point], str]] = MappingProxyType({}),
) -> str:
    """One line a row: accuracy, what is shown against the full cache, KL, attention error, bytes, ``extra`` columns."""
    rows = []
    watched = any(measured.moved(point.name) is not None for point in points)
    others = [point.name for point in points if point.name != measured.full]
    found = dict(zip(others, corrected([measured.compare(row, measured.full) for row in others]), strict=True))
    for point in points:
        row = point.name
        against = found.get(row)
        rows.append([
            str(name(point)),
            interval(measured.accuracy(row)),
            percent(measured.of_full(row)),
            "" if against is None else p_text(against.p),
            "(ceiling)" if against is None else against.words,
            kl_text(measured.kl(row)),
            *([percent(moved)] if (moved := measured.moved(row)) is not None else [""] * watched),
            f"{measured.bytes[row]:,.0f}",
            times(measured.shrink(row).mean),
            *(cell(point) for cell in extra.values()),
        ])  # fmt: skip
    head = [first, "accuracy", "% of full", p_head(len(others)), "against full", "KL to full (nats)"]
    head += ["attention error, %"] * watched + ["bytes", "smaller than BF16"]
    return markdown([*head, *extra], rows, left=(4,))


def kept_table(measured: Measured) -> str:
    """Of every family the row of fewest bytes that keeps :data:`KEPT`; families that have none come last."""
    rows = []
    families = measured.families()
    best = {family: measured.smallest_good(points) for family, points in families.items()}
    for family in sorted(families, key=lambda f: (best[f] is None, measured.bytes[(best[f] or families[f][0]).name])):
        point = best[family]
        if point is None:
            top = max(families[family], key=lambda p: measured.of_full(p.name).mean)
            rows.append([f"`{family}`", "none measured", percent(measured.of_full(top.name)) + " at most", "", "", ""])
            continue
        row = point.name
        against = measured.compare(row, measured.full)
        size = f"{measured.bytes[row]:,.0f}"
        rows.append([
            f"`{family}`", f"`{row}`", percent(measured.of_full(row)), against.words, size,
            times(measured.shrink(row).mean),
        ])  # fmt: skip
    head = ["family", "its smallest row", "% of full", "against full", "bytes", "smaller than BF16"]
    return markdown(head, rows, left=(1, 3))


def integers(measured: Measured, stage: str = "packed") -> dict[int, Point]:
    """Uniform integers on the whole cache under one lossless stage, by falling bits."""
    found = {p.bits: p for p in measured.points.values() if p.whole and p.bits and p.stage == stage}
    return {bits: found[bits] for bits in sorted(found, reverse=True)}


def integer_table(measured: Measured) -> str:
    """INT8 to INT1, and what the lossless stages make of their bytes."""
    extra = {f"bytes, {stage}": _size_under(measured, stage) for stage in LOSSLESS if integers(measured, stage)}
    return rows_table(measured, list(integers(measured).values()), "bits", lambda point: point.bits, extra)


def _size_under(measured: Measured, stage: str) -> Callable[[Point], str]:
    """Of a packed row, the bytes of its bits under another stage."""
    staged = integers(measured, stage)
    return lambda point: f"{measured.bytes[staged[point.bits].name]:,.0f}" if point.bits in staged else ""


def lossless_note(measured: Measured) -> list[str]:
    """Whether the lossless stages changed an answer, as measured."""
    plain = integers(measured)
    pairs = [(plain[b], p) for stage in LOSSLESS for b, p in integers(measured, stage).items() if b in plain]
    if not pairs:
        return []
    changed = sum(_judged(x, a) != _judged(x, b) for x in measured.lines for a, b in pairs)
    said = f"answer or KL differ in {changed:,} of" if changed else "answer and KL are the same in all"
    return [f"Lossless stages: {said} {len(pairs) * measured.n:,} pairs of rows with and without.", ""]


def _judged(line: Line, point: Point) -> tuple[float, float | None]:
    outcome = Outcome(*line.outcomes[point.name])
    return outcome.correct, outcome.kl


def comparison_table(measured: Measured, pairs: Sequence[Pair]) -> str:
    """Rows against others: bytes, accuracy and KL, paired."""
    rows = []
    kl_ps = [measured.kl_p(a.name, b.name) for _, a, b in pairs]
    known = iter(holm([p for p in kl_ps if p is not None]))
    for (what, point, other), against, kl_p in zip(pairs, compared(measured, pairs), kl_ps, strict=True):
        a, b = point.name, other.name
        kl = measured.kl_ratio(a, b)
        rows.append([
            f"`{a}`",
            f"`{b}`{f' ({what})' if what else ''}",
            f"{measured.bytes[a]:,.0f} / {measured.bytes[b]:,.0f}",
            interval(measured.size_ratio(a, b), 2),
            f"{measured.accuracy(a).mean:.3f} / {measured.accuracy(b).mean:.3f}",
            percent(against.difference),
            p_text(against.p),
            against.words,
            "" if kl is None else interval(kl, 2),
            "" if kl_p is None else p_text(next(known)),
            "" if kl is None else _less(kl),
        ])  # fmt: skip
    head = ["row", "against", "bytes", "ratio of bytes", "accuracy", "points", p_head(len(pairs)), "", "ratio of KL"]
    return markdown([*head, p_head(sum(p is not None for p in kl_ps)), ""], rows, left=(1, 7, 10))


def compared(measured: Measured, pairs: Sequence[Pair]) -> list[Comparison]:
    """Each pair, p corrected for how many there are."""
    return corrected([measured.compare(a.name, b.name) for _, a, b in pairs])


def _less(ratio: Estimate) -> str:
    if ratio.low <= 1 <= ratio.high:
        return SAME
    return "less harm" if ratio.mean < 1 else "more harm"


def uniform_pairs(measured: Measured) -> list[Pair]:
    """Other codecs on the whole cache against uniform integers of their bytes, the nearest that are coded alike.

    Where no integers were range-coded, those under zstd stand for them. Rows that no integers come near, within
    :data:`NEAR`, have no pair.
    """
    pairs = []
    for point in measured.points.values():
        codec = point.codec
        if not point.whole or codec is None or isinstance(codec, Integer) or point.name.startswith("full|bf16"):
            continue
        alike = integers(measured, point.stage) or integers(measured, "zstd")
        other = measured.nearest(point.name, list(alike.values()))
        if other is not None and 1 / NEAR <= measured.bytes[point.name] / measured.bytes[other.name] <= NEAR:
            pairs.append(("", point, other))
    return sorted(pairs, key=lambda pair: (not isinstance(pair[1].codec, Mixed), -measured.bytes[pair[1].name]))


def delta_pairs(measured: Measured) -> list[Pair]:
    """Differences against the numbers themselves: in the same steps, and in those that come nearest in bytes."""
    points = [p for p in measured.points.values() if isinstance(p.codec, Delta)]
    direct = {(p.base, codec_text(p.codec)): p for p in points if isinstance(p.codec, Delta) and not p.codec.group}
    pairs = []
    for point in measured.by_size(points):
        if not isinstance(point.codec, Delta) or not point.codec.group:
            continue
        same = direct.get((point.base, codec_text(replace(point.codec, group=0))))
        near = measured.nearest(point.name, [p for p in direct.values() if p.base == point.base])
        if same is not None:
            pairs.append(("same steps", point, same))
        if near is not None and near != same:
            pairs.append(("nearest bytes", point, near))
    return pairs


def svd_points(measured: Measured) -> list[Point]:
    """Whole caches cut to a rank, by falling rank."""
    points = [p for p in measured.points.values() if p.whole and p.rank and p.stage == "packed"]
    return sorted(points, key=lambda p: -(p.rank or 0))


def cliff_note(measured: Measured) -> list[str]:
    """The largest fall of accuracy from one measured rank to the next."""
    points = svd_points(measured)
    if len(points) < 2:
        return []
    steps = [("", b, a) for a, b in pairwise(points)]
    falls = zip(compared(measured, steps), steps, strict=True)
    worst, (_, b, a) = min(falls, key=lambda fall: fall[0].difference.mean)
    text = (
        f"The largest fall from one rank to the next measured: {a.rank} to {b.rank}, "
        f"{percent(worst.difference)} points ({p_head(len(steps))} {p_text(worst.p)}: {worst.words}; "
        f"{measured.of_full(a.name).mean:.1%} to {measured.of_full(b.name).mean:.1%} of full). "
        "The sources saw 95 % fall to 59 % between 64 and 32."
    )
    return [text, ""]


def retention_tables(measured: Measured) -> Iterable[str]:
    """Kept share of tokens down, bits across, for every scorer that was swept over integers."""
    groups: dict[str, list[Point]] = {}
    for p in measured.points.values():
        if p.recipe and p.bits and not p.whole and p.base != "none":
            groups.setdefault(p.family, []).append(p)
    for family, points in groups.items():
        whole = integers(measured, points[0].stage)
        cells = {(p.recipe.fraction, p.bits): p for p in points if p.recipe} | {(1.0, b): p for b, p in whole.items()}
        bits = sorted({p.bits for p in points if p.bits}, reverse=True)
        rows = []
        for fraction in sorted({f for f, _ in cells}, reverse=True):
            mine = [cells.get((fraction, b)) for b in bits]
            rows.append([f"{fraction:.0%}", *("" if p is None else _cell(measured, p) for p in mine)])
        yield f"`{family}`: % of full [95 %] at the share of the BF16 cache's bytes"
        yield ""
        yield markdown(["tokens kept", *(f"INT{b}" for b in bits)], rows)
        yield ""


def _cell(measured: Measured, point: Point) -> str:
    return f"{percent(measured.of_full(point.name))} at {measured.bytes[point.name] / measured.bf16:.1%}"


def command_note(head: dict[str, Any], lines: Sequence[Line], whole: str = "") -> str:
    """:func:`provenance_note`, where ``whole`` names the page that has the command with its recipes in full."""
    words = shlex.split(head.get("command") or "")
    recipes = words.count("--recipe")
    if recipes < 2 or not whole:
        return provenance_note(head, lines)
    kept = [w for i, w in enumerate(words) if w != "--recipe" and (i == 0 or words[i - 1] != "--recipe")]
    short = {**head, "command": f"{shlex.join(kept)} --recipe ..."}
    return f"{provenance_note(short, lines)} The {recipes} recipes: {whole}."


def render(results: Path, places: Places, title: str) -> str:
    """One section of RESULTS.md from one raw file; writes its figure, and the page with all rows."""
    head, lines = read(results)
    tables = {p: Measured(lines, p) for p in PROTOCOLS if any(x.protocol == p for x in lines)}
    figure, page = places.figure(results), places.detail(results)
    draw_codecs(figure, tables)
    link = f"[{page.name}]({places.link(page)})"
    text = [f"## {title}", "", command_note(head, lines, link), ""]
    text += [f"![bytes against accuracy, KL and attention error]({places.link(figure)})", ""]
    full = [f"# {title}", "", provenance_note(head, lines), ""]
    for protocol, measured in tables.items():
        name = f"Protocol {protocol}: {PROTOCOLS[protocol]}"
        text += [f"### {name}", "", *_section(measured)]
        text += [f"Mixed, SVD, delta, retention x bits, pictures, every row: {link}", ""]
        full += [f"## {name}", "", *_everything(measured, protocol)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(full))
    return "\n".join(text)


def _section(measured: Measured) -> Iterable[str]:
    """The smallest of every family, the integers, and the findings in words."""
    return [
        f"n = {measured.n} questions, the same for every row (paired). {BYTES}; the full cache in BF16 takes "
        f"{measured.bf16:,.0f}. {TESTS}.",
        *proxy_note(measured.names),
        "",
        f"Of every family the fewest bytes measured at which at least {KEPT:.0%} of the full cache's accuracy is "
        "reached. Nothing is interpolated; rows are chosen by the same questions that judge them, so a row on the edge "
        "may owe its place to luck (recipes chosen on other questions: the headline).",
        "",
        kept_table(measured),
        "",
        *_block("Uniform integers on the whole cache:", integer_table(measured), bool(integers(measured))),
        *lossless_note(measured),
        *_findings(measured),
    ]


def _findings(measured: Measured) -> list[str]:
    """Mixed against uniform, delta against direct, the cliff: a sentence each."""
    found = []
    pairs = [("Mixed against uniform", a, b) for _, a, b in uniform_pairs(measured) if isinstance(a.codec, Mixed)]
    pairs += [(f"Delta against direct, {way}", a, b) for way, a, b in delta_pairs(measured)]
    for (what, a, b), against in zip(pairs, compared(measured, pairs), strict=True):
        kl = measured.kl_ratio(a.name, b.name)
        harm = "" if kl is None else f"; KL {interval(kl, 2)} times: {_less(kl)}"
        found.append(
            f"* {what}: `{a.name}` to `{b.name}`: {interval(measured.size_ratio(a.name, b.name), 2)} times the bytes, "
            f"{percent(against.difference)} points ({p_head(len(pairs))} {p_text(against.p)}): {against.words}{harm}."
        )
    found += [f"* SVD: {line}" for line in cliff_note(measured) if line]
    return [*found, ""] if found else []


def _everything(measured: Measured, protocol: Protocol) -> Iterable[str]:
    """All rows, by what they answer."""
    pictures = [p for p in measured.points.values() if p.mode]
    best = [measured.smallest_good(measured.families()[family]) for family in measured.leaders()]
    kinds = [measured.full, *(p.name for p in best if p), *filter(None, [measured.floor])]
    ranks, pairs, deltas = svd_points(measured), uniform_pairs(measured), delta_pairs(measured)
    retention = "\n".join(retention_tables(measured)).rstrip()
    near = (
        "Codecs on the whole cache against the uniform integers of nearest bytes that are coded alike (packed, or "
        f"by an entropy coder); only those that some come near, by a factor of {NEAR:g} at most."
    )
    return [
        f"n = {measured.n} questions. {BYTES}; the full cache in BF16 takes {measured.bf16:,.0f}. {TESTS}.",
        *proxy_note(measured.names),
        "",
        *_block("### Uniform integers", integer_table(measured), bool(integers(measured))),
        *lossless_note(measured),
        *_block("### Mixed and other codecs against uniform at equal bytes", comparison_table(measured, pairs),
                bool(pairs), near),
        *_block("### SVD by rank", rows_table(measured, ranks, "rank", lambda point: point.rank), bool(ranks),
                *cliff_note(measured)[:1]),
        *_block("### Delta against direct", comparison_table(measured, deltas), bool(deltas),
                "Differences from an anchor token against the numbers themselves, by the same range coder."),
        *_block("### Kept tokens and bits", retention, bool(retention),
                "The sources: q2c at 75 % and INT4 keep 96 % at 18.75 % of the bytes."),
        *_block("### Pictures instead of caches", rows_table(measured, measured.by_size(pictures)), bool(pictures),
                "`image:Q`: the pictures as JPEG of that quality; `embeds:CODEC`: their visual embeddings; the cloud "
                "prefills what it decodes. Bytes of the files, or embeddings, alone."),
        "### Every row, largest first",
        "",
        rows_table(measured, measured.by_size(list(measured.points.values()))),
        "",
        f"### By kind of question: the smallest of the leading families at {KEPT:.0%}",
        "",
        kind_table(measured.lines, protocol, kinds),
        "",
    ]  # fmt: skip


def _block(title: str, table: str, there: bool, note: str = "") -> list[str]:
    """A titled table, or nothing where there are no rows for it."""
    return [title, "", *([note, ""] if note else []), table, ""] if there else []
