"""Who asks by HTTP, and a request as admission knows it, beside those that come by gRPC."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from kvferry.cloud.admission import Admission
from kvferry.cloud.door.request import RefusalError
from kvferry.cloud.limits import Limits
from kvferry.errors import KVFerryError
from kvferry.security.tokens import ANYBODY, Caller, Tokens

if TYPE_CHECKING:
    from aiohttp import web


class Guest:
    """One request.

    Attributes
    ----------
    complete : bool
        All of its body is here.
    heard_at : float
        When the last byte came, by the monotonic clock.
    why : KVFerryError or None
        Why it was ended from outside.
    stream : StreamResponse or None
        Its answer in pieces, once that has begun.
    """

    attached = True

    def __init__(self, caller: Caller, peer: str) -> None:
        self.caller, self.peer = caller, peer
        self.complete = False
        self.heard_at = time.monotonic()
        self.why: KVFerryError | None = None
        self.stream: web.StreamResponse | None = None
        self._task = asyncio.current_task()

    @property
    def identity(self) -> str:
        """Whose place in turns it takes."""
        return self.caller.owner or self.peer

    def end(self, error: KVFerryError | None = None) -> None:
        """Stop the work on it at once; ``error`` is what its client is told."""
        if self._task is not None and self.why is None:
            self.why = error
            self._task.cancel()

    def goes_on(self) -> None:
        """Its task was cancelled by :meth:`end`, and has last words to say."""
        if self._task is not None:
            self._task.uncancel()

    async def read(self, request: web.Request, limits: Limits, heard: Callable[[int], None]) -> bytes:
        """Its body, whose size is known to be allowed.

        Raises
        ------
        RefusalError
            Nothing came for too long.
        """
        body = bytearray()
        while True:
            try:
                async with asyncio.timeout(limits.idle_seconds):
                    piece = await request.content.readany()
            except TimeoutError:
                raise RefusalError(f"nothing came for {limits.idle_seconds:g} s; ask again", 408, "body") from None
            if not piece:
                self.complete, self.heard_at = True, time.monotonic()
                return bytes(body)
            body += piece
            self.heard_at = time.monotonic()
            heard(len(piece))

    def leave(self, admission: Admission, queue_seconds: float) -> None:
        """It is over: the time that it had of the model is counted."""
        admission.drop(self)
        if self.complete:
            seconds = time.monotonic() - self.heard_at - queue_seconds
            admission.pay(self.caller, "model_seconds", max(seconds, 0.0))


def caller_of(request: web.Request, tokens: Tokens | None) -> Caller:
    """Who asks, by its token and its certificate, named as for gRPC: quotas count what comes by either together.

    Raises
    ------
    AccessError
        It shows no valid token.
    """
    caller = ANYBODY if tokens is None else tokens.caller(request.headers.get("Authorization", ""))
    shown = request.get_extra_info("peercert") or {}
    names = [value for part in shown.get("subject", ()) for key, value in part if key == "commonName"]
    return replace(caller, certificate=names[0]) if names else caller


def peer_of(request: web.Request) -> str:
    """The machine at the other end, as gRPC writes it."""
    remote = request.remote or ""
    return f"ipv6:{quote(f'[{remote}]', safe=':')}" if ":" in remote else f"ipv4:{remote}"


def check_scope(caller: Caller, *scopes: str) -> None:
    """RefusalError (403) unless the caller may do one of them."""
    if not any(map(caller.may, scopes)):
        may = f"{caller.name} may not {' or '.join(scopes)} here (only {', '.join(caller.scopes)})"
        raise RefusalError(f"{may}; ask the cloud's operator", 403, None, "permission_denied")
