"""The first section of RESULTS.md: recipes that were chosen on other questions, beside the pictures as JPEG."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from kvferry.codecs import Transform
from kvferry.codecs.profile import Profile
from kvferry.codecs.profile_store import for_encoding
from kvferry.errors import FingerprintError, InputError
from kvferry.evaluate.measured import KEPT, PICTURES, SAME, Comparison, Measured, Point, corrected
from kvferry.evaluate.records import read
from kvferry.evaluate.tables import PROTOCOLS, interval, markdown, proxy_note
from kvferry.statistics import Estimate
from study.codec_tables import (
    BYTES,
    TESTS,
    command_note,
    kl_text,
    p_head,
    p_text,
    percent,
    rows_table,
    times,
)
from study.page import Places

QUALITY = 90
"""Of the JPEG that stands for the picture as it comes."""


def tuned(folder: Path, fingerprint: str, protocol: str) -> list[dict[str, Any]]:
    """Reports of ``kvferry tune`` for one model and protocol, of :data:`KEPT` first, then by their names."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("tune-*.json"))]
    mine = [r for r in reports if (r["fingerprint"], r["protocol"]) == (fingerprint, protocol)]
    return sorted(mine, key=lambda report: report["target"] != KEPT)


def chosen(measured: Measured, reports: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows here that a tuning has chosen, and its report."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        if report["winner"] and report["winner"]["recipe"] in measured.points:
            found.setdefault(report["winner"]["recipe"], report)
    return found


def first_of(measured: Measured, picked: dict[str, dict[str, Any]]) -> Point | None:
    """The row that the headline is about: chosen beforehand for :data:`KEPT`; else the smallest that keeps it here."""
    row = next((row for row, report in picked.items() if report["target"] == KEPT), None)
    if row is not None:
        return measured.points[row]
    return smallest(measured)


def smallest(measured: Measured) -> Point | None:
    """Of the caches that a deployment can send, the fewest bytes that keep :data:`KEPT` here."""
    caches = (p for p in measured.points.values() if p.recipe and p.deployable)
    return measured.smallest_good([p for p in caches if p.name != measured.full])


def pictures(measured: Measured) -> list[Point]:
    """As JPEG, largest first."""
    return measured.by_size([p for p in measured.points.values() if p.family == PICTURES])


def references(measured: Measured) -> list[tuple[str, Point]]:
    """The JPEG of :data:`QUALITY`, and the smallest from which the model still answers well; one row may be both."""
    named = [(f"JPEG of quality {p.quality}", p) for p in pictures(measured) if p.quality == QUALITY]
    least = measured.smallest_good(pictures(measured))
    if least is not None:
        named.append((f"smallest JPEG at {KEPT:.0%} of full: quality {least.quality}", least))
    return named


def shown(measured: Measured) -> list[Point]:
    """All rows but the pictures of other qualities than those of :func:`references`."""
    named = [other.name for _, other in references(measured)]
    return [p for p in measured.points.values() if p.family != PICTURES or p.name in named]


def against_each(measured: Measured, point: Point) -> dict[str, Comparison]:
    """``point`` minus every other row that is shown, p corrected for how many these are."""
    others = [p.name for p in shown(measured) if p.name != point.name]
    return dict(zip(others, corrected([measured.compare(point.name, row) for row in others]), strict=True))


def headline(measured: Measured, point: Point, beforehand: bool) -> list[str]:
    """The sentences that everything else is there for; only what was chosen beforehand is set in bold."""
    row = point.name
    share, shrink = measured.of_full(row), measured.shrink(row)
    others = against_each(measured, point)
    against, p_is = others[measured.full], p_head(len(others))
    how = "chosen on validation" if beforehand else "chosen on these very questions, so it flatters itself"
    bold = "**" if beforehand else ""
    lines = [
        f"* {bold}`{row}` ({how}): {interval(measured.size(row), 0)} bytes a question, {_times(shrink)} smaller than "
        f"the BF16 cache ({measured.bf16:,.0f} bytes), at {percent(share)} % of the full cache's accuracy{bold} "
        f"(difference {percent(against.difference)} points, {p_is} {p_text(against.p)}: {against.words}). "
        f"{_reach(share)}"
    ]
    for name, other in references(measured):
        against, ratio = others[other.name], measured.size_ratio(other.name, row)
        more = interval(ratio, 1 if ratio.mean >= 10 else 2)
        lines.append(
            f"* {name}: {measured.bytes[other.name]:,.0f} bytes at {percent(measured.of_full(other.name))} % of full. "
            f"The picture takes {more} times the recipe's bytes: {_bytes_words(ratio)}; recipe minus "
            f"picture: {percent(against.difference)} points ({p_is} {p_text(against.p)}): {against.words}."
        )
    if pictures(measured) and measured.smallest_good(pictures(measured)) is None:
        lines.append(f"* No JPEG measured keeps {KEPT:.0%} of the full cache's accuracy.")
    return lines


def _said(measured: Measured, picked: dict[str, dict[str, Any]], point: Point | None) -> list[str]:
    """:func:`headline`, and where what was chosen beforehand falls short, what keeps :data:`KEPT` here."""
    if point is None:
        return [f"* No recipe here keeps {KEPT:.0%} of the full cache's accuracy."]
    lines = headline(measured, point, picked.get(point.name, {}).get("target") == KEPT)
    other = smallest(measured)
    if not measured.good(point.name) and other is not None:
        lines += headline(measured, other, beforehand=False)[:1]
    return lines


def _times(a: Estimate) -> str:
    return f"{times(a.mean)} [{times(a.low)}, {times(a.high)}]"


def _reach(share: Estimate) -> str:
    """What is shown about :data:`KEPT`."""
    if share.mean < KEPT:
        return f"It falls short of the {KEPT:.0%} it should keep on these questions."
    if share.low < KEPT:
        return f"It keeps {KEPT:.0%} as measured; the interval reaches below."
    return f"It keeps {KEPT:.0%}, the whole interval does."


def _bytes_words(ratio: Estimate) -> str:
    if ratio.low <= 1 <= ratio.high:
        return SAME
    return "the recipe is smaller" if ratio.mean > 1 else "the picture is smaller"


def headline_table(measured: Measured, picked: dict[str, dict[str, Any]], point: Point | None) -> str:
    """All rows that are :func:`shown`: bytes and accuracy with intervals, and ``point`` against each."""
    named = {other.name: name for name, other in references(measured)}
    others = {} if point is None else against_each(measured, point)
    rows = []
    for p in measured.by_size(shown(measured)):
        row = p.name
        what = named.get(row) or f"`{row}`{_role(measured, row, picked)}"
        cells = [what, interval(measured.size(row), 0), times(measured.shrink(row).mean)]
        cells += [interval(measured.accuracy(row)), percent(measured.of_full(row)), kl_text(measured.kl(row))]
        if row in others:
            against = others[row]
            cells += [percent(against.difference), p_text(against.p), against.words]
        rows.append([*cells, *[""] * (9 - len(cells))])
    head = ["sent", "bytes", "smaller than BF16", "accuracy", "% of full", "KL to full (nats)"]
    ahead = "points" if point is None else f"`{point.name}` minus this: points"
    return markdown([*head, ahead, p_head(len(others)), ""], rows, left=(8,))


def _role(measured: Measured, row: str, picked: dict[str, dict[str, Any]]) -> str:
    if row in picked:
        return f" (chosen for {picked[row]['target']:.0%})"
    return " (ceiling)" if row == measured.full else " (floor: no visual token)" if row == measured.floor else ""


def tuning_notes(reports: Sequence[dict[str, Any]], picked: dict[str, dict[str, Any]]) -> list[str]:
    """What each tuning chose, on what, by which command."""
    notes = []
    for report in reports:
        winner = report["winner"]
        n = max((standing["n"] for standing in report["standings"]), default=0)
        choice = f"chose `{winner['recipe']}`" if winner else "found no recipe that surely keeps it"
        missing = " (not swept here)" if winner and winner["recipe"] not in picked else ""
        notes.append(
            f"`{report['command']}` at commit `{report['commit'][:12]}` asked for {report['target']:.0%} of full on "
            f"`{report['split']}` (last round: {n} questions) and {choice}{missing}."
        )
    return notes or ["No tuning of this model and protocol lies beside the results."]


def profile_note(fingerprint: str, points: Iterable[Point]) -> str:
    """What both ends hold beforehand for these rows, and how large it is."""
    profiles = dict.fromkeys(p.codec.profile for p in points if isinstance(p.codec, Transform))
    notes = []
    for path in profiles:
        try:
            size = f"{len(for_encoding(Profile, path, fingerprint)[0].to_bytes()):,} bytes"
        except (InputError, FingerprintError):
            size = "unknown size (it was not there when this page was made)"
        notes.append(f"a profile of {size} for `transform{f'@{path}' if path else ''}`")
    return f" Both ends hold {' and '.join(notes)} beforehand, which is not counted." if notes else ""


def render(results: Path, places: Places, title: str) -> str:
    """The section of one raw file, with the tunings that lie beside it; writes the page with all rows."""
    head, lines = read(results)
    page = places.detail(results)
    link = f"[{page.name}]({places.link(page)})"
    text = [f"## {title}", "", command_note(head, lines, link), ""]
    full = [f"# {title}", "", command_note(head, lines), ""]
    for protocol in (p for p in PROTOCOLS if any(x.protocol == p for x in lines)):
        measured = Measured(lines, protocol)
        reports = tuned(results.parent, head["fingerprint"], protocol)
        picked = chosen(measured, reports)
        point = first_of(measured, picked)
        name = f"Protocol {protocol}: {PROTOCOLS[protocol]}"
        caches = [p for p in measured.points.values() if p.recipe]
        text += [
            f"### {name}",
            "",
            *_said(measured, picked, point),
            "",
            f"n = {measured.n} questions, the same for every row (paired). Small models and drawn scenes: the ratios "
            f"are theirs. {BYTES}; of pictures those of the files alone, without the "
            f"question.{profile_note(head['fingerprint'], caches)} "
            f"{TESTS}. JPEG qualities are those measured, nothing is interpolated; the smallest is chosen on these "
            "questions, which favours the picture.",
            *proxy_note(measured.names),
            "",
            headline_table(measured, picked, point),
            "",
            *(f"{note}\n" for note in tuning_notes(reports, picked)),
            f"All JPEG qualities, every row: {link}",
            "",
        ]
        every = rows_table(measured, measured.by_size(list(measured.points.values())))
        full += [f"## {name}", "", f"n = {measured.n} questions. {BYTES}. {TESTS}.", "", every, ""]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(full))
    return "\n".join(text)
