"""Pictures that a browser hands over: bounded, and whole."""

from __future__ import annotations

from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from kvferry.errors import InputError
from kvferry.pictures import open_picture

MAX_UPLOAD = 20 * 1024 * 1024
"""Bytes of one picture file."""
FORM_BYTES = 64 * 1024
"""What a form adds around a file, at most."""


def picture_of(data: bytes, name: str) -> Any:
    """The RGB picture in an uploaded file, as every other door of the library reads it.

    Raises
    ------
    InputError
        Larger than :data:`MAX_UPLOAD`, or no picture.
    """
    if len(data) > MAX_UPLOAD:
        raise InputError(f"{name} has {len(data):,} bytes; at most {MAX_UPLOAD:,} are taken, make it smaller")
    return open_picture(data, name)


class BoundedUploads:
    """Middleware that refuses a request whose body is announced, or turns out, to be larger than a picture may be."""

    def __init__(self, app: ASGIApp, most: int = MAX_UPLOAD + FORM_BYTES) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > self._most:
            await PlainTextResponse("too large", status_code=413)(scope, receive, send)
            return
        taken = 0

        async def bounded() -> Any:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most:
                return {"type": "http.disconnect"}
            return message

        await self._app(scope, bounded, send)
