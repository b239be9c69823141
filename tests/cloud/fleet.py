"""Parts of a fleet without Ray, as processes of their own: ``python -m tests.cloud.fleet replica MODEL SECRET`` and
``... gateway SECRET ADDRESS...``. Each prints where it listens."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence

from kvferry.cloud.fleet import Relay, Replicas
from kvferry.cloud.fleet.trust import GatewayOnly
from kvferry.cloud.limits import Limits
from kvferry.cloud.monitor import Monitor
from kvferry.cloud.server import host, serve
from kvferry.security.access import Access
from kvferry.security.tokens import Tokens
from kvferry.telemetry import set_up_logs


def say(address: str) -> None:
    print(json.dumps({"address": address}), flush=True)


def replica(model: str, secret: str) -> None:
    from kvferry.models import load

    serve(load(model), "127.0.0.1:0", on_ready=say, access=GatewayOnly(secret))


async def nothing() -> None:
    pass


async def gateway(secret: str, tokens: str, addresses: Sequence[str]) -> None:
    replicas = Replicas()
    for number, address in enumerate(addresses):
        await replicas.put(f"replica-{number}", address)
    relay = Relay(replicas, Limits(), secret, Monitor())
    access = Access(Tokens(tokens) if tokens else None)
    await host(
        relay, access, Limits(), "127.0.0.1:0", None, False, say, lambda: replicas.ready > 0, nothing, replicas.close
    )


if __name__ == "__main__":
    set_up_logs("json", verbose=False)
    what, *words = sys.argv[1:]
    if what == "replica":
        replica(*words)
    else:
        asyncio.run(gateway(words[0], words[1], words[2:]))
