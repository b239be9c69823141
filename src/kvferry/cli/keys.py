"""``kvferry keys``: certificates and tokens, made where they are kept."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer

from kvferry.cli.console import print_json
from kvferry.errors import InputError

WHAT = ("ca", "server", "edge", "token")


def keys(
    what: Annotated[str, typer.Argument(help="ca, server, edge or token.", show_default=False)],
    folder: Annotated[
        Path, typer.Argument(help="Where ca.pem and ca.key lie, or will lie; of token: the file of hashes.")
    ],
    name: Annotated[str, typer.Option(help="Of an edge or a token: how the cloud knows it.", show_default=False)] = "",
    host: Annotated[
        list[str] | None, typer.Option(help="Of a server: a name or address that edges call it by; repeatable.")
    ] = None,
    days: Annotated[
        int | None, typer.Option(help="For how long: a CA 3650 days, others 397, a token for ever.", min=1, max=3650)
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="Of a token: ask, ask:MODE, describe, share (coordinator); repeatable. Else ask, describe."),
    ] = None,
    calls: Annotated[int | None, typer.Option(help="Of a token: open at a time.", min=1)] = None,
    bytes_per_minute: Annotated[int | None, typer.Option(help="Of a token.", min=1)] = None,
    model_seconds_per_minute: Annotated[float | None, typer.Option(help="Of a token.", min=0.001)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the token into this new file (0600) instead of on stdout.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make a CA, a cloud's or an edge's certificate, or a token. Nothing is overwritten."""
    if what not in WHAT:
        raise InputError(f"there are no keys of kind {what!r}; use {', '.join(WHAT)}")
    if bool(name) != (what in ("edge", "token")):
        raise InputError("an edge and a token have a --name, others none")
    if (host and what != "server") or (what != "token" and (scope or calls or out)):
        raise InputError("--host is for a server; --scope, --calls and --out are for a token")
    if what == "token":
        _token(folder, name, scope, days, out, json, calls=calls, bytes_per_minute=bytes_per_minute,
               model_seconds_per_minute=model_seconds_per_minute)  # fmt: skip
        return
    from kvferry.security import keys as made

    if what == "ca":
        written = made.make_ca(folder, days=days or made.CA_DAYS)
    elif what == "server":
        written = made.make_server(folder, host or (), days or made.DAYS)
    else:
        written = made.make_edge(folder, name, days or made.DAYS)
    if json:
        print_json({"certificate": str(written[0]), "key": str(written[1])})
    else:
        print(f"{written[0]} (certificate), {written[1]} (key: keep it secret)")


def _token(
    file: Path, name: str, scope: list[str] | None, days: int | None, out: Path | None, json: bool, **quotas: Any
) -> None:
    from kvferry.files import write_whole
    from kvferry.security.tokens import DEFAULT_SCOPES, new_token

    if out is not None and out.exists():
        raise InputError(f"{out} is there already and is left as it is; choose another file, or remove it")
    if days is not None:
        quotas["expires"] = datetime.now(UTC) + timedelta(days=days)
    token = new_token(file, name, scope or DEFAULT_SCOPES, **quotas)
    if out is not None:
        write_whole(out, token + "\n", secret=True, new=True)
    if json:
        print_json({"name": name, "token": None if out else token, "token_file": str(out) if out else None})
    elif out is not None:
        print(f"{out} (token of {name}: keep it secret), its hash is in {file}")
    else:
        print(token)
