"""The section of RESULTS.md on modes, from a points file of ``kvferry profile``, and the sources' beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvferry.evaluate.tables import PROTOCOLS, markdown
from kvferry.policy import OperatingPoint, PointTable, read_points
from study.codec_tables import times
from study.page import Places

RATES = (10, 100)
"""Mbit/s."""
FULL, FLOOR, PICTURE = "kv:full|bf16", "kv:none|bf16", "image"
CLAIMED = {
    FULL: (9.7e6, 1.0),
    "kv:full|int8": (4.7e6, 0.994),
    "kv:full|mixed": (2.6e6, 0.936),
    "kv:full|int4": (2.3e6, 0.687),
}
"""The sources' modes, a profile's name left out: bytes, and quality as a share of the full cache's."""


def beside_the_sources(points: Sequence[OperatingPoint]) -> str:
    """The table's caches beside those of claim 13, where it has all four; else nothing. The verdict is that of
    :mod:`study.claims.modes`, from more questions and by a paired test."""
    found = {point.mode.partition("@")[0]: point for point in points}
    if any(mode not in found for mode in CLAIMED):
        return ""
    full = found[FULL]
    parts = []
    for mode, (nbytes, share) in list(CLAIMED.items())[1:]:
        point = found[mode]
        ratio, theirs = full.nbytes / point.nbytes, CLAIMED[FULL][0] / nbytes
        parts.append(
            f"`{point.mode}` {times(ratio)} smaller at {100 * point.quality / full.quality:.1f} % of full "
            f"(sources {times(theirs)}, {100 * share:.1f} %)"
        )
    return f"* Beside the sources (claim 13, judged in the first table of this page): {'; '.join(parts)}."


def modes_table(points: Sequence[OperatingPoint]) -> str:
    """Bytes, quality, time to send, and where the seconds go; largest first, what a session saves below its mode."""
    ceiling = next((p for mode in (FULL, PICTURE) for p in points if p.mode == mode and not _held(p)), None)
    full = next((p for p in points if p.mode == FULL), None)
    first = {p.mode: p.nbytes for p in points if not _held(p)}
    rows = []
    for p in sorted(points, key=lambda p: (-first.get(p.mode, p.nbytes), p.mode, _held(p))):
        name = f"`{p.mode}`" + (", picture held" if _held(p) else "")
        name += " (ceiling)" if p is ceiling else " (floor: no visual token)" if p.mode == FLOOR else ""
        low, high = p.interval
        rows.append(
            [
                name,
                f"{p.quality:.3f} [{low:.3f}, {high:.3f}]",
                "" if ceiling is None else f"{100 * p.quality / ceiling.quality:.1f}",
                f"{p.nbytes:,}",
                times(full.nbytes / p.nbytes) if full and p.nbytes else "",
                *(f"{8 * p.nbytes / (1e3 * rate):,.1f}" for rate in RATES),
                f"{1e3 * (p.edge_seconds + p.compress_seconds):.0f}",
                f"{1e3 * (p.decompress_seconds + p.cloud_seconds):.0f}",
                _prefill(p),
                ", ".join(x for x in p.needs if x != "held_picture") or "neither",
            ]
        )
    head = ["mode", "quality", "% of ceiling", "bytes", "smaller than BF16"]
    head += [*(f"ms to send, {rate} Mbit/s" for rate in RATES), "edge ms", "cloud ms"]
    return markdown([*head, "cloud prefills", "pixels or embeddings leave"], rows, left=(9, 10))


def _held(point: OperatingPoint) -> bool:
    return "held_picture" in point.needs


def _prefill(point: OperatingPoint) -> str:
    """Whether the cloud prefills, and how much of its time that takes."""
    if not point.prefills:
        return "no"
    return f"yes, {point.prefill_seconds / point.cloud_seconds:.0%} of its ms" if point.prefill_seconds else "yes"


def render(results: Path, places: Places, title: str) -> str:
    """The section of one points file."""
    del places
    text = [f"## {title}", ""]
    for table in read_points(results):
        text += [*_section(table), ""]
    return "\n".join(text)


def _section(table: PointTable) -> list[str]:
    said = beside_the_sources(table.points)
    return [
        f"{table.name}. Made by `{table.source.partition(': ')[0]}`: {table.source.partition(': ')[2]}.",
        "",
        f"Protocol A: {PROTOCOLS['A']}. The questions are the same for every row; intervals are Wilson's, 95 %, each "
        "row by itself (paired tests of the codecs: the sections above). Bytes are all messages up, the question and "
        "their framing included, without gRPC's and TCP's; time to send is bytes over the rate, without round trip. "
        "Milliseconds are medians of one machine for both ends, shared with other work while they were taken: they "
        "tell what dominates, not how fast a device is.",
        "",
        *([said, ""] if said else []),
        modes_table(table.points),
    ]
