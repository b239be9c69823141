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
    load: Annotated[str, typer.Option(help="Shares of the time that the cloud's prefill is busy.")] = "0,0.95",
    edge_tflops: Annotated[float, typer.Option(help="Assumed speed of the edge's prefill.")] = 20.0,
    cloud_tflops: Annotated[float, typer.Option(help="Assumed speed of the cloud's prefill.")] = 150.0,
    codec: Annotated[float, typer.Option(help="Assumed GB of BF16 cache encoded, or decoded, per second.")] = 2.0,
    rtt: Annotated[float, typer.Option(help="Round trip in ms.", min=0)] = 40.0,
    privacy: Annotated[list[str] | None, typer.Option(help="no-pixels, no-embeds; repeatable.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the share of each map that a mode wins.")] = False,
) -> None:
    """Where does a cache beat the picture? Maps over bandwidth, context length and cloud load, by formula."""
    import numpy as np

    from kvferry.policy.break_even import SHAPES, Machines, break_even_map, draw_maps
    from kvferry.policy.simulation.report import write_png

    known = {shape.name: shape for shape in SHAPES}
    if unknown := set(model or ()) - set(known):
        raise InputError(f"there are no sizes of {', '.join(sorted(unknown))}; use {', '.join(known)}")
    try:
        loads = [float(x) for x in load.split(",")]
    except ValueError:
        raise InputError(f"{load!r} is not a list of shares such as 0,0.95") from None
    shapes = [known[name] for name in model or known]
    machines = Machines(1e12 * edge_tflops, 1e12 * cloud_tflops, 1e9 * codec, rtt / 1000)
    rules = frozenset(privacy or ())
    mbit = np.geomspace(1, 10_000, 121)
    tokens = np.round(np.geomspace(64, 32_768, 91)).astype(np.int64)
    write_png(draw_maps(mbit, tokens, loads, shapes, machines, rules), out)
    if not json:
        print(f"wrote {out}")
        return
    maps = []
    for shape in shapes:
        for held in (False, True):
            for share in loads:
                modes, best, _ = break_even_map(shape, mbit, tokens, share, machines, held, rules)
                counts = np.bincount(best.ravel(), minlength=len(modes)) / best.size
                areas = dict(zip(modes, counts.tolist(), strict=True))
                maps.append({"model": shape.name, "load": share, "edge_holds_cache": held, "areas": areas})
    print_json({"out": str(out), "maps": maps})
