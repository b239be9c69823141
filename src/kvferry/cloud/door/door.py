"""``/v1/chat/completions``, ``/v1/models`` and ``/health`` over HTTP, on the engine that serves edges."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from kvferry.cloud.costs import Account, Budget
from kvferry.cloud.door.receiver import ChatReceiver
from kvferry.cloud.door.request import Chat, ParameterError, parse
from kvferry.cloud.engine import Answering, Engine
from kvferry.cloud.limits import Limits
from kvferry.cloud.line import Place
from kvferry.cloud.monitor import DENIED, Monitor, Record
from kvferry.cloud.sessions import Sessions
from kvferry.errors import AccessError, DeadlineError, DependencyError, KVFerryError, LinkError
from kvferry.link import parse_address
from kvferry.modes import BusyError

if TYPE_CHECKING:
    from aiohttp import web

    from kvferry.models import VLM

T = TypeVar("T")
log = logging.getLogger(__name__)
MOST_BYTES = 64 * 1024 * 1024
"""Of one request, whatever the limits."""
BODY_COPIES = 4
"""Of a request's bytes in memory at once: as they arrive, as JSON, in base64, and decoded."""
REFUSED = "input"
"""What a request came to that HTTP itself refuses, as errors of that kind."""
Authenticate = Callable[[Mapping[str, str]], str]
"""From a request's headers to whose it is; raises AccessError."""


def anybody(headers: Mapping[str, str]) -> str:
    """Lets everybody in."""
    return ""


class Door:
    """Answers chat requests.

    Parameters
    ----------
    authenticate : callable
        Says whose a request is, from its headers; requests of the same identity share their place in turns.
    """

    def __init__(
        self,
        vlm: VLM,
        engine: Engine,
        limits: Limits,
        sessions: Sessions,
        budget: Budget,
        authenticate: Authenticate = anybody,
        monitor: Monitor | None = None,
    ) -> None:
        self._budget, self._monitor = budget, monitor or Monitor()
        self._vlm, self._engine, self._limits, self._sessions = vlm, engine, limits, sessions
        self._authenticate = authenticate
        self._born = int(time.time())
        self._most = min(limits.request_bytes, MOST_BYTES)
        self._runner: Any = None

    async def open(self, listen: str, tls: Any = None) -> str:
        """Listen; returns the address with the port that was taken."""
        try:
            from aiohttp import web
        except ImportError:
            raise DependencyError("--http needs aiohttp; install kvferry[http]") from None
        host, port = parse_address(listen)
        app = web.Application(client_max_size=self._most)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, ssl_context=tls)
        try:
            await site.start()
        except OSError:
            await self.close()
            why = "the port is taken or the host is not this machine"
            raise LinkError(f"cannot listen on {listen}: {why}; choose another") from None
        return f"{host}:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        """End what runs, and listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _health(self, request: web.Request) -> web.Response:
        return _json({"status": "ok", "model": self._vlm.name})

    async def _models(self, request: web.Request) -> web.Response:
        try:
            self._authenticate(request.headers)
        except KVFerryError as error:
            return _failed(error)
        model = {"id": self._vlm.name, "object": "model", "created": self._born, "owned_by": "kvferry"}
        return _json({"object": "list", "data": [{**model, "fingerprint": self._vlm.fingerprint}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        headers = [(name.lower(), value) for name, value in request.headers.items()]
        with self._monitor.request(lambda: None, headers) as record:
            record.mode, record.request_id = "http", f"http-{secrets.token_hex(8)}"
            return await self._watched(request, record)

    async def _watched(self, request: web.Request, record: Record) -> web.StreamResponse:
        try:
            identity = self._authenticate(request.headers) or f"http:{request.remote}"
            if request.content_length is None:
                record.ended(REFUSED)
                return _error(411, "this cloud takes no body of unknown size; send a Content-Length", "body")
            if request.content_length > self._most:
                record.ended(REFUSED)
                return _error(413, f"more than {self._most:,} bytes in one request; send smaller pictures", "body")
            with self._engine.place(identity) as place, self._budget.account() as account:
                async with asyncio.timeout(self._limits.request_seconds):
                    account.reserve(BODY_COPIES * request.content_length)
                    return await self._answered(request, place, account, record)
        except TimeoutError:
            late = f"the cloud gives a question {self._limits.request_seconds:g} s; send less or ask for less"
            record.failed(DeadlineError(late))
            return _failed(DeadlineError(late))
        except AccessError as error:
            record.ended(DENIED)
            return _failed(error)
        except KVFerryError as error:
            record.failed(error)
            log.info("refused %s: %s: %s", record.request_id, type(error).__name__, error)
            return _failed(error)
        except Exception as error:
            record.failed(error)
            if type(error).__name__ == "HTTPRequestEntityTooLarge":
                return _error(413, f"more than {self._most:,} bytes in one request; send smaller pictures", "body")
            log.exception("failed on %s", record.request_id)
            return _failed(error)

    async def _answered(
        self, request: web.Request, place: Place, account: Account, record: Record
    ) -> web.StreamResponse:
        raw = await request.read()
        record.arrived(len(raw))

        async def decode(work: Callable[..., T], *given: object) -> T:
            """In a thread, within what a request may take of it."""

            def counted() -> T:
                with account.working():
                    return work(*given)

            return await self._engine.decode(counted, heavy=account.heavy)

        chat = await decode(_parsed, raw, self._limits.new_tokens)
        del raw
        if chat.model != self._vlm.name:
            missing = f"there is no model {chat.model!r} here, only {self._vlm.name!r}"
            record.ended(REFUSED)
            return _error(404, missing, "model", "model_not_found")
        receiver = await decode(self._receiver, chat, account)
        await decode(receiver.finish)
        record.decode_seconds = account.seconds
        talk = _Talk(self._engine, self._vlm, receiver, chat, place, record)
        if chat.stream:
            return await self._streamed(request, talk)
        pieces = [piece async for piece in talk.pieces()]
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": talk.finish, "logprobs": None}
        return _json({**talk.head("chat.completion"), "choices": [choice], "usage": talk.usage})

    def _receiver(self, chat: Chat, account: Account) -> ChatReceiver:
        pictures = self._engine.workshop.opener(account)
        store = self._sessions.store(b"", False, reserve=account.reserve, open_picture=pictures)
        return ChatReceiver(self._vlm, chat, store, self._most)

    async def _streamed(self, request: web.Request, talk: _Talk) -> web.StreamResponse:
        """Server-sent events. What goes wrong before the first token is an HTTP error, afterwards an event."""
        from aiohttp import web

        pieces = talk.pieces()
        first = await anext(pieces, "")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)

        async def say(delta: dict[str, Any], finish: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
            await response.write(_event({**talk.head("chat.completion.chunk"), "choices": [choice]}))

        try:
            await say({"role": "assistant", "content": first})
            async for piece in pieces:
                if piece:
                    await say({"content": piece})
            await say({}, talk.finish)
            if talk.chat.usage:
                await response.write(
                    _event({**talk.head("chat.completion.chunk"), "choices": [], "usage": talk.usage})
                )
        except KVFerryError as error:
            talk.failed(error)
            await response.write(_event(_body(*_status(error))))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response


def _parsed(raw: bytes, most_tokens: int) -> Chat:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise ParameterError("the body is not JSON; send an object with model and messages", "body") from None
    return parse(body, most_tokens)


class _Talk:
    """One answer as it is made."""

    def __init__(
        self, engine: Engine, vlm: VLM, receiver: ChatReceiver, chat: Chat, place: Place, record: Record
    ) -> None:
        self.chat, self.finish = chat, "stop"
        self._record = record
        self._engine, self._vlm, self._receiver, self._place = engine, vlm, receiver, place
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._tokens = 0

    def failed(self, error: KVFerryError) -> None:
        """It broke after its first words."""
        self._record.failed(error)

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._vlm.name}

    @property
    def usage(self) -> dict[str, int]:
        prompt = self._receiver.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self._tokens, "total_tokens": prompt + self._tokens}

    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text without what stops it; a piece that may begin a stop waits until that is known."""
        text, said = "", 0
        async with self._engine.answering(self._vlm, self._receiver, self.chat.max_tokens, self._place) as answering:
            async for _, piece in answering:
                self._tokens += 1
                text += piece
                if (end := min((at for x in self.chat.stop if (at := text.find(x)) >= 0), default=-1)) >= 0:
                    self._note(answering)
                    yield text[said:end]
                    return
                safe = len(text) - _pending(text, self.chat.stop)
                yield text[said:safe]
                said = safe
            whole = (await answering.result()).text
            self._note(answering)
        self.finish = "length" if self._tokens >= self.chat.max_tokens else "stop"
        end = min((at for x in self.chat.stop if (at := whole.find(x)) >= 0), default=len(whole))
        yield whole[said:end]


    def _note(self, answering: Answering) -> None:
        """The answer is complete."""
        record, work = self._record, answering.work
        record.answered, record.tokens = True, self._tokens
        record.queue_seconds, record.first_token_seconds = work.queue_seconds, work.first_token_seconds


def _pending(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop."""
    return max((n for x in stops for n in range(1, len(x)) if text.endswith(x[:n])), default=0)


def _status(error: BaseException) -> tuple[int, str, str | None, str | None]:
    """HTTP status, message, parameter and code."""
    if isinstance(error, BusyError):
        return 429, str(error), None, "busy"
    if isinstance(error, AccessError):
        return 401, str(error), None, "invalid_api_key"
    if isinstance(error, DeadlineError):
        return 504, str(error), None, "deadline"
    if isinstance(error, KVFerryError):
        return 400, str(error), getattr(error, "param", None), None
    return 500, "the cloud failed on this request through no fault of yours; its log says why", None, None


def _body(status: int, message: str, param: str | None, code: str | None) -> dict[str, Any]:
    kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 504: "server_error"}
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _failed(error: BaseException) -> web.Response:
    response = _error(*_status(error))
    if isinstance(error, BusyError) and error.retry_seconds:
        response.headers["Retry-After"] = str(max(1, round(error.retry_seconds)))
        response.headers["Retry-After-Ms"] = str(round(1000 * error.retry_seconds))
    return response


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> web.Response:
    return _json(_body(status, message, param, code), status)


def _json(body: dict[str, Any], status: int = 200) -> web.Response:
    from aiohttp import web

    return web.json_response(body, status=status)


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"
