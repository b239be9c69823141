"""``kvferry link`` and ``kvferry trace``: a slow link before a server, and what to drive it with."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.console import print_json
from kvferry.errors import InputError

KINDS = "gilbert-elliott, walk"


def link(
    target: Annotated[str, typer.Argument(help="host:port of the server, for instance of `kvferry serve`.")],
    uplink: Annotated[str | None, typer.Option(help="A rate like 10mbit, or trace:NAME (shipped) or trace:FILE.")] = (
        None
    ),
    downlink: Annotated[str | None, typer.Option(help="The same for the way back.")] = None,
    delay: Annotated[float, typer.Option(help="One-way delay in ms.", min=0)] = 0.0,
    seconds: Annotated[float | None, typer.Option(help="Stop after so long; by default when interrupted.", min=0)] = (
        None
    ),
    json: Annotated[bool, typer.Option("--json", help="Print both lines as JSON.")] = False,
) -> None:
    """Relay connections to a server over an emulated link. The trace begins with the first byte."""
    from kvferry.link import ShapedLink

    with ShapedLink(target, uplink, downlink, delay) as relay:
        if json:
            print_json({"address": relay.address, "target": target})
        else:
            print(f"{relay.address} leads to {target}", flush=True)
        try:
            threading.Event().wait(seconds)
        except KeyboardInterrupt:
            pass
        finally:
            carried = {"uplink_bytes": relay.uplink_bytes, "downlink_bytes": relay.downlink_bytes}
    if json:
        print_json(carried)
    else:
        print("carried {uplink_bytes:,} bytes up, {downlink_bytes:,} down".format(**carried))


def trace(
    kind: Annotated[str, typer.Argument(help=f"{KINDS}; or 'shipped' to write the package's own again.")],
    out: Annotated[Path, typer.Option(help="The file; with 'shipped' the folder.")],
    seconds: Annotated[float, typer.Option(help="Length.", min=0.1, max=86_400)] = 60.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same trace.", min=0)] = 0,
    high: Annotated[float, typer.Option(help="Mbit/s of the good state, or the walk's fastest.")] = 10.0,
    low: Annotated[float, typer.Option(help="Mbit/s of the bad state (0: outage), or the walk's slowest.")] = 0.0,
    good_seconds: Annotated[float, typer.Option(help="Gilbert-Elliott: mean time in the good state.")] = 5.0,
    bad_seconds: Annotated[float, typer.Option(help="Gilbert-Elliott: mean time in the bad state.")] = 1.0,
) -> None:
    """Draw a synthetic link and write it in Mahimahi's format."""
    from kvferry.link.channels import SHIPPED, GilbertElliott, walk
    from kvferry.link.trace import write_trace

    if kind == "shipped":
        for name, (channel, length, number) in SHIPPED.items():
            write_trace(channel.trace(length, number), out / f"{name}.txt")
        print(f"wrote {', '.join(SHIPPED)} to {out}")
        return
    if kind == "gilbert-elliott":
        drawn = GilbertElliott(high, low, good_seconds, bad_seconds).trace(seconds, seed)
    elif kind == "walk":
        drawn = walk(low, high).trace(seconds, seed)
    else:
        raise InputError(f"there is no kind of trace {kind!r}; use {KINDS} or shipped")
    write_trace(drawn, out)
    print(f"wrote {out}: {drawn.period:g} s at {8e-6 * drawn.period_bytes / drawn.period:.2f} Mbit/s on average")
