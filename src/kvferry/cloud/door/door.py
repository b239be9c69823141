"""``/v1/chat/completions``, ``/v1/models`` and ``/health`` over HTTP, on the engine that serves edges."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from kvferry.checkpoint import known_as
from kvferry.cloud.admission import Admission
from kvferry.cloud.costs import Account, Budget
from kvferry.cloud.door.guest import Guest, caller_of, check_scope, peer_of
from kvferry.cloud.door.receiver import ChatReceiver
from kvferry.cloud.door.replies import body_of, event, failed, refused, said
from kvferry.cloud.door.request import Chat, ParameterError, RefusalError, parse
from kvferry.cloud.engine import Answering, Engine
from kvferry.cloud.limits import Limits
from kvferry.cloud.line import Place
from kvferry.cloud.monitor import DENIED, Monitor, Record
from kvferry.cloud.sessions import Sessions
from kvferry.errors import DeadlineError, DependencyError, KVFerryError, LinkError
from kvferry.link import parse_address
from kvferry.security.access import Access

if TYPE_CHECKING:
    from aiohttp import web

    from kvferry.models import VLM

T = TypeVar("T")
log = logging.getLogger(__name__)
MOST_BYTES = 64 * 1024 * 1024
"""Of one request, whatever the limits."""
LAST_WORDS_SECONDS = 0.2
"""For the end of a stream whose reader may have stopped."""
DONE = b"data: [DONE]\n\n"
PATHS = "there are POST /v1/chat/completions, GET /v1/models and GET /health"
BODY_COPIES = 4
"""Of a request's bytes in memory at once: as they arrive, as JSON, in base64, and decoded."""


class Door:
    """Answers chat requests.

    Parameters
    ----------
    access : Access
        Whose tokens are let in.
    admission : Admission
        Counts requests, beside those that come another way, against limits and quotas.
    """

    def __init__(
        self,
        vlm: VLM,
        engine: Engine,
        limits: Limits,
        sessions: Sessions,
        budget: Budget,
        access: Access,
        admission: Admission,
        monitor: Monitor | None = None,
    ) -> None:
        self._budget, self._monitor = budget, monitor or Monitor()
        self._vlm, self._engine, self._limits, self._sessions = vlm, engine, limits, sessions
        self._access, self._admission = access, admission
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
        app = web.Application(client_max_size=self._most, middlewares=[_in_form()])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            handle_signals=False,
            handler_cancellation=True,  # who hangs up frees the model
            shutdown_timeout=LAST_WORDS_SECONDS,
        )
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
        stuck = self._engine.stuck_seconds >= self._limits.stuck_seconds
        status = "ending" if self._admission.ending else "stuck" if stuck else "ok"
        return said({"status": status, "model": known_as(self._vlm.name)}, 200 if status == "ok" else 503)

    async def _models(self, request: web.Request) -> web.Response:
        try:
            check_scope(caller_of(request, self._access.tokens), "describe")
        except KVFerryError as error:
            return failed(error)
        model = {"id": known_as(self._vlm.name), "object": "model", "created": self._born, "owned_by": "kvferry"}
        return said({"object": "list", "data": [{**model, "fingerprint": self._vlm.fingerprint}]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        headers = [(name.lower(), value) for name, value in request.headers.items()]
        with self._monitor.request(lambda: None, headers) as record:
            record.mode, record.request_id = "http", f"http-{secrets.token_hex(8)}"
            try:
                guest = Guest(caller_of(request, self._access.tokens), peer_of(request))
                check_scope(guest.caller, "ask:image", "ask:kv")
            except KVFerryError as error:
                record.ended(DENIED)
                return failed(error)
            return await self._watched(request, guest, record)

    async def _watched(self, request: web.Request, guest: Guest, record: Record) -> web.StreamResponse:
        error: BaseException
        try:
            return await self._admitted(request, guest, record)
        except asyncio.CancelledError:
            if guest.why is None:
                raise
            guest.goes_on()
            error = guest.why
        except TimeoutError:
            error = DeadlineError(
                f"the cloud gives a question {self._limits.request_seconds:g} s; send less or ask for less"
            )
        except ConnectionError:  # nobody reads any more
            raise asyncio.CancelledError from None
        except KVFerryError as known:
            error = known
            log.info("refused %s: %s: %s", record.request_id, type(error).__name__, error)
        except Exception as broken:
            error = broken
            log.exception("failed on %s", record.request_id)
        record.failed(error)
        return failed(error) if guest.stream is None else await _last_words(guest.stream, error)

    async def _admitted(self, request: web.Request, guest: Guest, record: Record) -> web.StreamResponse:
        self._admission.admit(guest.caller, guest.peer)
        self._admission.add(guest)
        try:
            size = self._size(request)
            with self._engine.place(guest.identity) as place, self._budget.account() as account:
                async with asyncio.timeout(self._limits.request_seconds):
                    account.reserve(BODY_COPIES * size)
                    return await self._answered(request, guest, place, account, record)
        finally:
            guest.leave(self._admission, record.queue_seconds)

    def _size(self, request: web.Request) -> int:
        """Of the body, by what is announced; RefusalError where no such body is taken."""
        if request.content_type != "application/json":
            raise RefusalError("the body is JSON: send Content-Type: application/json", 415, "body")
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise RefusalError("the body is JSON as it is: send no Content-Encoding", 415, "body")
        if request.content_length is None:
            raise RefusalError("this cloud takes no body of unknown size; send a Content-Length", 411, "body")
        if request.content_length > self._most:
            too_much = f"more than {self._most:,} bytes in one request; send smaller pictures"
            raise RefusalError(too_much, 413, "body")
        return request.content_length

    async def _answered(
        self, request: web.Request, guest: Guest, place: Place, account: Account, record: Record
    ) -> web.StreamResponse:
        def heard(nbytes: int) -> None:
            record.arrived(nbytes)
            self._admission.pay(guest.caller, "bytes", nbytes)
            self._admission.check(guest.caller)

        raw = await guest.read(request, self._limits, heard)

        async def decode(work: Callable[..., T], *given: object) -> T:
            """In a thread, within what a request may take of it."""

            def counted() -> T:
                with account.working():
                    return work(*given)

            return await self._engine.decode(counted, heavy=account.heavy)

        chat = await decode(_parsed, raw, self._limits.new_tokens)
        del raw
        if chat.model != known_as(self._vlm.name):
            missing = f"there is no model {chat.model!r} here, only {known_as(self._vlm.name)!r}"
            raise RefusalError(missing, 404, "model", "model_not_found")
        check_scope(guest.caller, "ask:image" if chat.cache is None else "ask:kv")
        receiver = await decode(self._receiver, chat, account)
        await decode(receiver.finish)
        record.decode_seconds = account.seconds
        talk = _Talk(self._engine, self._vlm, receiver, chat, place, record)
        if chat.stream:
            return await self._streamed(request, guest, talk)
        pieces = [piece async for piece in talk.pieces()]
        message = {"role": "assistant", "content": "".join(pieces), "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": talk.finish, "logprobs": None}
        return said({**talk.head("chat.completion"), "choices": [choice], "usage": talk.usage})

    def _receiver(self, chat: Chat, account: Account) -> ChatReceiver:
        pictures = self._engine.workshop.opener(account)
        store = self._sessions.store(b"", False, reserve=account.reserve, open_picture=pictures)
        return ChatReceiver(self._vlm, chat, store, self._most)

    async def _streamed(self, request: web.Request, guest: Guest, talk: _Talk) -> web.StreamResponse:
        """Server-sent events. What goes wrong before the first token is an HTTP error, afterwards an event."""
        from aiohttp import web

        pieces = talk.pieces()
        first = await anext(pieces, "")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        await response.prepare(request)
        guest.stream = response

        async def say(delta: dict[str, Any], finish: str | None = None) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
            await response.write(event({**talk.head("chat.completion.chunk"), "choices": [choice]}))

        await say({"role": "assistant", "content": first})
        async for piece in pieces:
            if piece:
                await say({"content": piece})
        await say({}, talk.finish)
        if talk.chat.usage:
            await response.write(event({**talk.head("chat.completion.chunk"), "choices": [], "usage": talk.usage}))
        await response.write(DONE)
        await response.write_eof()
        return response


async def _last_words(stream: web.StreamResponse, error: BaseException) -> web.StreamResponse:
    """The end of an answer that broke after it had begun: an event with the error, for who still reads."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(LAST_WORDS_SECONDS):
            await stream.write(event(body_of(error)))
            await stream.write(DONE)
            await stream.write_eof()
    return stream


@functools.cache
def _in_form() -> Any:
    """Makes aiohttp's own refusals (no such path, no such method) errors of OpenAI's form."""
    from aiohttp import web

    @web.middleware
    async def in_form(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            answer: web.StreamResponse = await handler(request)
            return answer
        except web.HTTPException as error:
            response = refused(error.status, f"{request.method} {request.path}: {error.reason}; {PATHS}")
            if "Allow" in error.headers:
                response.headers["Allow"] = error.headers["Allow"]
            return response

    return in_form


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

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": known_as(self._vlm.name)}

    @property
    def usage(self) -> dict[str, int]:
        prompt = self._receiver.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self._tokens, "total_tokens": prompt + self._tokens}

    async def pieces(self) -> AsyncIterator[str]:
        """The answer's text without what stops it; a piece that may begin a stop waits until that is known."""
        text, sent = "", 0
        async with self._engine.answering(self._vlm, self._receiver, self.chat.max_tokens, self._place) as answering:
            async for _, piece in answering:
                self._tokens += 1
                text += piece
                if (end := min((at for x in self.chat.stop if (at := text.find(x)) >= 0), default=-1)) >= 0:
                    self._note(answering)
                    yield text[sent:end]
                    return
                safe = len(text) - _pending(text, self.chat.stop)
                yield text[sent:safe]
                sent = safe
            whole = (await answering.result()).text
            self._note(answering)
        self.finish = "length" if self._tokens >= self.chat.max_tokens else "stop"
        end = min((at for x in self.chat.stop if (at := whole.find(x)) >= 0), default=len(whole))
        yield whole[sent:end]

    def _note(self, answering: Answering) -> None:
        """The answer is complete."""
        record, work = self._record, answering.work
        record.answered, record.tokens = True, self._tokens
        record.queue_seconds, record.first_token_seconds = work.queue_seconds, work.first_token_seconds


def _pending(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of ``text`` may be the beginning of a stop."""
    return max((n for x in stops for n in range(1, len(x)) if text.endswith(x[:n])), default=0)
