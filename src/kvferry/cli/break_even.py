"""``kvferry break-even``: which mode is the fastest where."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.console import print_json
from kvferry.errors import InputError


def break_even(
    out: Annotated[Path, typer.Option(help="The figure, a PNG.")],
    model: Annotated[list[str] | None, typer.Option(help="Qwen2-VL-2B, Qwen2-VL-7B, LLaVA-1.5-7B; repeatable.")] = (
        None
    ),
    points: Annotated[
        Path | None, typer.Option(help="A table by `kvferry profile`: one more map, from what was measured.")
    ] = None,
    tokens: Annotated[
        str, typer.Option(help="Visual tokens: the map's, and up to three more whose border is drawn.")
    ] = "1369,16384",
    edge_tflops: Annotated[float, typer.Option(help="Assumed speed of the edge's prefill.")] = 20.0,
    cloud_tflops: Annotated[float, typer.Option(help="Assumed speed of the cloud's prefill.")] = 150.0,
    codec: Annotated[float, typer.Option(help="Assumed GB of BF16 cache encoded, or decoded, per second.")] = 2.0,
    rtt: Annotated[float, typer.Option(help="Round trip in ms.", min=0)] = 40.0,
    privacy: Annotated[list[str] | None, typer.Option(help="no-pixels, no-embeds; repeatable.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the share of each map that a mode wins.")] = False,
) -> None:
    """Where does a cache beat the picture? Maps over bandwidth, cloud load and context length."""
    import numpy as np

    from kvferry.policy import read_points
    from kvferry.policy.break_even import SHAPES, Machines, break_even_map
    from kvferry.policy.break_even_figure import STYLES, draw_maps, panels
    from kvferry.policy.simulation.report import write_png

    known = {shape.name: shape for shape in SHAPES}
    if unknown := set(model or ()) - set(known):
        raise InputError(f"there are no sizes of {', '.join(sorted(unknown))}; use {', '.join(known)}")
    try:
        lengths = [int(x) for x in tokens.split(",")]
    except ValueError:
        raise InputError(f"{tokens!r} is not a list of numbers of tokens such as 1369,16384") from None
    if len(lengths) > 1 + len(STYLES):
        raise InputError(f"at most {1 + len(STYLES)} numbers of tokens fit into a map; leave some out")
    machines = Machines(1e12 * edge_tflops, 1e12 * cloud_tflops, 1e9 * codec, rtt / 1000)
    rules = frozenset(privacy or ())
    table = None
    if points is not None:
        table, *rest = read_points(points)
        if rest:
            raise InputError(f"{points} holds {1 + len(rest)} tables; give a file with one")
    mbit = np.geomspace(1, 10_000, 241)
    load = 1 - 1 / np.geomspace(1, 100, 161)
    rows = panels([known[name] for name in model or known], lengths, machines, table)
    write_png(draw_maps(rows, mbit, load, machines, rules), out)
    if not json:
        print(f"wrote {out}")
        return
    maps = []
    for panel in (panel for row in rows for panel in row):
        for length in panel.lengths:
            found = panel.points(length)
            best, _ = break_even_map(found, mbit, load, machines.rtt_seconds, rules)
            counts = np.bincount(best.ravel(), minlength=len(found)) / best.size
            areas = {x.mode: share for x, share in zip(found, counts.tolist(), strict=True)}
            named = {"map": panel.title.replace("\n", " "), "edge_holds_cache": panel.held}
            maps.append({**named, "tokens": length or None, "areas": areas})
    print_json({"out": str(out), "maps": maps})
