"""Who is at the other end of a call, by its token and its certificate."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NoReturn

import grpc

from kvferry.errors import AccessError
from kvferry.security.tokens import ANYBODY, Caller, Tokens

CALLER: ContextVar[Caller] = ContextVar("kvferry_caller", default=ANYBODY)
"""Who asked what the present task works on."""


class Access:
    """Lets callers in.

    Parameters
    ----------
    tokens : Tokens or None
        None asks nobody for a token.
    """

    def __init__(self, tokens: Tokens | None = None) -> None:
        self.tokens = tokens

    async def admit(self, context: grpc.aio.ServicerContext[Any, Any], what: str = "") -> Caller:
        """The caller, if it may do ``what``; else the call ends with UNAUTHENTICATED or PERMISSION_DENIED."""
        try:
            caller = self._caller(context)
        except AccessError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        if what:
            await self.check(context, caller, what)
        return caller

    async def check(self, context: grpc.aio.ServicerContext[Any, Any], caller: Caller, what: str) -> None:
        """End the call with PERMISSION_DENIED unless the caller may do ``what``."""
        if not caller.may(what):
            await self.deny(context, f"{caller.name} may not {what} here (only {', '.join(caller.scopes)})")

    async def deny(self, context: grpc.aio.ServicerContext[Any, Any], why: str) -> NoReturn:
        """End the call."""
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{why}; ask the cloud's operator")
        raise AssertionError("abort raises")

    def _caller(self, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        names = context.auth_context().get("x509_common_name", ())
        certificate = next(iter(names), b"").decode("utf-8", "replace")
        if self.tokens is None:
            return replace(ANYBODY, certificate=certificate) if certificate else ANYBODY
        shown = next((value for key, value in context.invocation_metadata() or () if key == "authorization"), "")
        return replace(self.tokens.caller(str(shown)), certificate=certificate)


def on_hangup(work: Callable[[], None]) -> None:
    """Do this in the running loop on SIGHUP, where there is such a signal and it can be had."""
    with contextlib.suppress(AttributeError, NotImplementedError, RuntimeError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, work)


def peer_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The machine at the other end, without its port."""
    return str(context.peer()).rpartition(":")[0]
