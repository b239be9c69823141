"""``kvferry studio``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from kvferry.cli.console import Device, Dtype, print_json, waiting
from kvferry.errors import DependencyError

SHIPPED = ("testbed/cloud", "testbed/edge", "testbed/control")


def studio(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Folders or Hub ids, offered beside the shipped models."),
    ] = None,
    named: Annotated[list[str] | None, typer.Option("--model", help="MODEL, by name; repeatable.")] = None,
    device: Device = "",
    dtype: Dtype = "auto",
    listen: Annotated[str, typer.Option(help="host:port of the page; port 0 takes a free one. No password.")] = (
        "127.0.0.1:7430"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")] = False,
) -> None:
    """A page to look at: which tokens of a picture stay, what they cost, and what the answer becomes."""
    if find_spec("nicegui") is None:
        raise DependencyError("the studio needs NiceGUI; pip install 'kvferry[studio]'")
    from kvferry.link import parse_address

    parse_address(listen)
    with waiting("starting the studio", json):
        from kvferry.studio.app import serve_studio
        from kvferry.studio.live import Shelf

        shelf = Shelf([*(models or ()), *(named or ()), *SHIPPED], device, dtype)
        shelf.model(shelf.names[0])

    def ready(address: str) -> None:
        if json:
            print_json({"address": address, "models": shelf.names})
        else:
            print(f"the studio is at {address} (Ctrl+C ends it)", flush=True)

    serve_studio(shelf, listen, ready)
