"""Deadlines met and quality kept, with caches in tiers and without: ``python benchmarks/deadlines.py --traces FOLDER``.

Measured points (``kvferry profile --tiers 8``) of the caches alone, on the shipped links and, where a folder with
``cellular-uplink`` or ``5g-driving-downlink`` is given, on recorded ones. "In steps" means that the smallest cache may
go before a better one. Seconds of computing count 0 unless ``--seconds`` is given: the question is what the link does.
``--published`` takes the published points of Qwen-7B, whose qualities differ, and *assumes* for each of them the curve
that was measured of ``full|int4`` on the testbed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from kvferry.link import Trace, read_trace, shipped_traces
from kvferry.policy import Context, OperatingPoint, PointTable, Way, read_points
from kvferry.policy.simulation import Scenario, report, simulate

POINTS = Path(__file__).parents[1] / "study" / "results" / "tiers8-cloud.json"
CURVE = "kv:full|int4"
STEP = ";"
RTT = 0.04
PROBE_BYTES = 16 * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=Path, default=POINTS)
    parser.add_argument("--traces", type=Path, help="a folder with cellular-uplink/ and 5g-driving-downlink/")
    parser.add_argument("--deadlines", default="0.2,1,3,5")
    parser.add_argument("--policies", default="risk-aware")
    parser.add_argument("--requests", type=int, default=6_000)
    parser.add_argument("--seconds", action="store_true", help="count the seconds of computing too")
    parser.add_argument("--published", action="store_true", help="Qwen-7B's points, with an assumed curve")
    parser.add_argument("--into", type=Path, help="a page whose block between the two marks is replaced")
    arguments = parser.parse_args()
    caches = [x for x in read_points(arguments.points)[0].points if x.kind == "kv"]
    if not arguments.seconds:
        caches = [replace(x, **dict.fromkeys(SECONDS, 0.0)) for x in caches]
    smallest = min(caches, key=lambda x: x.nbytes).mode
    sets = {_sizes(some): some for some in ([x for x in caches if smallest not in x.mode], caches)}
    if arguments.published:
        published = _published(next(x for x in caches if x.mode == CURVE))
        sets = {"2.3 to 9.7 MB": [*published, *_in_steps(published)]}
    deadlines = [float(x) for x in arguments.deadlines.split(",")]
    lines = []
    for line in _page(sets, arguments.traces, deadlines, arguments.policies.split(","), arguments.requests):
        print(line, flush=True)
        lines.append(line)
    page = "\n".join(lines)
    if arguments.into is not None:
        name = "deadlines-published" if arguments.published else "deadlines"
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, opened, rest = arguments.into.read_text().partition(begin)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            raise SystemExit(f"{arguments.into} needs the two lines {begin} and {end}")
        arguments.into.write_text(f"{before}{opened}\n{page}\n{closed}{after}")


SECONDS = ("edge_seconds", "compress_seconds", "decompress_seconds", "cloud_seconds")


def _sizes(points: Sequence[OperatingPoint]) -> str:
    """Of those that are sent singly, largest first."""
    sizes = sorted((x.nbytes / 1000 for x in points if STEP not in x.mode), reverse=True)
    return f"{', '.join(f'{x:.0f}' if x >= 2 else f'{x:.1f}' for x in sizes)} kB"


def _page(
    sets: dict[str, Sequence[OperatingPoint]],
    folder: Path | None,
    deadlines: Sequence[float],
    ways: Sequence[str],
    count: int,
) -> Iterator[str]:
    yield "| link | caches | sent | policy | " + " | ".join(f"{x:g} s" for x in deadlines) + " |"
    yield "|---|---|---|---|" + "---:|" * len(deadlines)
    for link, traces in _links(folder):
        for name, points in sets.items():
            singly = [x for x in points if STEP not in x.mode]
            whole = [replace(x, tiers=1, anytime=()) for x in singly]
            steps = [x for x in points if STEP in x.mode]
            ways_to_send = {"whole": whole, "in tiers": singly, "in steps": [*whole, *steps] if steps else []}
            for sent, kept in ways_to_send.items():
                if not kept:
                    continue
                table = PointTable(name, tuple(kept))
                cells = [_cells(table, traces, deadline, ways, count) for deadline in deadlines]
                for i, way in enumerate(ways):
                    yield f"| {link} | {name} | {sent} | {way} | " + " | ".join(x[i] for x in cells) + " |"


def _published(measured: OperatingPoint) -> list[OperatingPoint]:
    """Their points as if a part of each were worth what a part of the measured one is, relative to the whole."""
    return [
        replace(
            x, tiers=measured.tiers, anytime=tuple((s, q / measured.quality * x.quality) for s, q in measured.anytime)
        )
        for x in read_points("scout-paper")[0].points
    ]


def _in_steps(points: Sequence[OperatingPoint]) -> Iterator[OperatingPoint]:
    """The smallest first, and then each of the others, whole."""
    small, *others = sorted(points, key=lambda x: x.nbytes)
    for large in others:
        both = small.nbytes + large.nbytes
        mode = f"{small.mode}{STEP}{large.mode.removeprefix('kv:')}"
        yield replace(large, mode=mode, nbytes=both, tiers=1, anytime=((small.nbytes / both, small.quality),))


def _cells(table: PointTable, traces: tuple[Trace, ...], deadline: float, ways: Sequence[str], count: int) -> list[str]:
    """Answered in time / of those that could be / quality of the oracle's, in percent, for each way."""
    scenario = Scenario((table,), traces, Context(deadline, RTT), requests=count, probe_bytes=PROBE_BYTES)
    oracle = simulate(scenario, Way.parse("oracle"))
    cells = []
    for way in ways:
        row = report.row(deadline, way, "", simulate(scenario, Way.parse(way)), oracle)
        possible = f"{100 * row.of_possible.mean:.2f}" if row.of_possible else "-"
        best = f"{100 * row.of_oracle.mean:.1f}" if row.of_oracle else "-"
        cells.append(f"{100 * row.on_time.mean:.1f} / {possible} / {best}")
    return cells


def _links(folder: Path | None) -> Iterator[tuple[str, tuple[Trace, ...]]]:
    yield "shipped (4)", tuple(read_trace(name) for name in shipped_traces())
    if folder is not None:
        if uplinks := sorted((folder / "cellular-uplink").glob("*.up")):
            yield f"cellular uplinks ({len(uplinks)})", tuple(read_trace(x) for x in uplinks)
        if downlinks := sorted((folder / "5g-driving-downlink").glob("*.tsv")):
            yield f"5G downlinks x 0.07 ({len(downlinks)})", tuple(read_trace(x, 0.07) for x in downlinks)


if __name__ == "__main__":
    main()
