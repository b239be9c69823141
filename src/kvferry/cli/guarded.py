"""What ``serve`` and ``coordinate`` share: who may come in, and over what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from kvferry.security import ServerKeys

Cert = Annotated[Path | None, typer.Option(help="Speak TLS with this certificate; `kvferry keys server` makes one.")]
Key = Annotated[Path | None, typer.Option(help="Its key.")]
ClientCA = Annotated[Path | None, typer.Option(help="Let in only edges with a certificate of this CA (mutual TLS).")]
TokensFile = Annotated[
    Path | None, typer.Option(help="Let in only edges with a token whose hash is in this file; SIGHUP reads it again.")
]
Insecure = Annotated[bool, typer.Option("--insecure", help="Listen without TLS where other machines can reach it.")]


def guarded(
    listen: str, cert: Path | None, key: Path | None, client_ca: Path | None, tokens: Path | None, insecure: bool
) -> ServerKeys | None:
    """The keys, and all else looked at before a model is loaded.

    Raises
    ------
    InputError
        Something cannot be used, or this would listen to other machines without TLS.
    """
    from kvferry.security import ServerKeys, Tokens
    from kvferry.security.tls import check_listen

    keys = ServerKeys.found(cert, key, client_ca)
    check_listen(listen, keys, insecure)
    if keys is not None:
        keys.credentials()
    if tokens is not None:
        Tokens(tokens)
    return keys
