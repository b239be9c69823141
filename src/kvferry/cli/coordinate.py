"""``kvferry coordinate``."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from kvferry.cli.console import print_json
from kvferry.cli.guarded import Cert, ClientCA, Insecure, Key, TokensFile, guarded


def coordinate(
    uplink: Annotated[
        str, typer.Option(help="The most that is shared out: a rate like 10mbit, trace:NAME (shipped) or trace:FILE.")
    ],
    listen: Annotated[str, typer.Option(help="host:port; port 0 takes a free one.")] = "127.0.0.1:7422",
    cert: Cert = None,
    key: Key = None,
    client_ca: ClientCA = None,
    tokens: TokensFile = None,
    insecure: Insecure = False,
    method: Annotated[str, typer.Option(help="equal, model_aware, max_min, quality or marginal.")] = "quality",
    lease: Annotated[float, typer.Option(help="Who is silent for so many seconds is no member any more.")] = 3.0,
    idle: Annotated[
        float, typer.Option(help="Who asks nothing for so many seconds gives its share to the others until it does.")
    ] = 10.0,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log who comes and goes.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the ready line as JSON.")] = False,
) -> None:
    """Share one uplink out among edges (`kvferry ask --coordinator`), until interrupted."""
    from kvferry.coordinator import coordinate as run

    keys = guarded(listen, cert, key, client_ca, tokens, insecure)
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, format="%(asctime)s %(message)s")

    def ready(address: str) -> None:
        if json:
            print_json({"address": address, "uplink": uplink, "method": method})
        else:
            print(f"sharing out {uplink} by {method}, listening on {address}", flush=True)

    run(
        uplink, listen, method=method, lease_seconds=lease, idle_seconds=idle, on_ready=ready, keys=keys, tokens=tokens,
        insecure=insecure,
    )  # fmt: skip
