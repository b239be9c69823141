"""What the door answers: errors of OpenAI's form with HTTP's status, JSON, and events."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from kvferry.cloud.door.request import RefusalError
from kvferry.errors import AccessError, DeadlineError, KVFerryError
from kvferry.modes import BusyError
from kvferry.wire.faults import EndingError, QuotaError

if TYPE_CHECKING:
    from aiohttp import web

ENDING_SECONDS = 5.0
"""After which a cloud that shuts down may be asked again: another may stand in its place by then."""
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def status_of(error: BaseException) -> tuple[int, str, str | None, str | None]:
    """HTTP status, message, parameter and code."""
    if isinstance(error, QuotaError):
        return 429, str(error), None, "rate_limit_exceeded"
    if isinstance(error, BusyError):
        return 429, str(error), None, "busy"
    if isinstance(error, EndingError):
        return 503, str(error), None, "ending"
    if isinstance(error, AccessError):
        return 401, str(error), None, "invalid_api_key"
    if isinstance(error, DeadlineError):
        return 504, str(error), None, "deadline"
    if isinstance(error, RefusalError):
        return error.status, str(error), error.param, error.code
    if isinstance(error, KVFerryError):
        return 400, str(error), None, None
    return 500, "the cloud failed on this request through no fault of yours; its log says why", None, None


def body_of(error: BaseException) -> dict[str, Any]:
    """The error as OpenAI's clients read it."""
    return _body(*status_of(error))


def failed(error: BaseException) -> web.Response:
    """The error as a response, which says when to come again where that helps."""
    response = refused(*status_of(error))
    if response.status in (429, 503):
        hint = getattr(error, "wait_seconds", 0.0) or getattr(error, "retry_seconds", 0.0)
        seconds = ENDING_SECONDS if response.status == 503 else hint
        response.headers["Retry-After"] = str(max(1, math.ceil(seconds)))
        if seconds:
            response.headers["Retry-After-Ms"] = str(math.ceil(1000 * seconds))
    elif response.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def refused(status: int, message: str, param: str | None = None, code: str | None = None) -> web.Response:
    """An error that has no exception."""
    return said(_body(status, message, param, code), status)


def said(body: dict[str, Any], status: int = 200) -> web.Response:
    """A JSON object."""
    from aiohttp import web

    return web.json_response(body, status=status)


def event(body: dict[str, Any]) -> bytes:
    """A server-sent one."""
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
