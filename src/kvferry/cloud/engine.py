"""The model behind the server: one answer at a time, in a thread of its own, with a bounded line before it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from kvferry.modes import BusyError, Receiver

if TYPE_CHECKING:
    from kvferry.models import Continuation

T = TypeVar("T")
DECODERS = 2
NEWEST = 0.3
"""Weight of the newest answer in what answers usually take."""


class _Abandoned(Exception):  # noqa: N818
    """Nobody waits for this answer any more; ends the decoding loop at its next token."""


class Answering:
    """One answer under way: iterate over its tokens (id, text), then take the :meth:`result`.

    Attributes
    ----------
    queue_seconds, first_token_seconds : float
        From asking until the model was free, and until the first token (or the end, if there was none).
    busy_seconds : float
        How long the model worked on it; 0 before it ends.
    """

    def __init__(self, receiver: Receiver, max_new_tokens: int) -> None:
        self.queue_seconds = 0.0
        self.first_token_seconds = 0.0
        self.busy_seconds = 0.0
        self._receiver = receiver
        self._max_new_tokens = max_new_tokens
        self._asked = time.perf_counter()
        self._loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        self._abandoned = threading.Event()
        self._future: asyncio.Future[Continuation] | None = None

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """Stand in line."""
        self._future = self._loop.run_in_executor(pool, self._run)
        self._future.add_done_callback(self._ended)

    def abandon(self) -> None:
        """Stop at the next token, or before the first if it has not begun."""
        self._abandoned.set()
        if self._future is not None:
            self._future.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, str]]:
        while (token := await self._tokens.get()) is not None:
            yield token

    async def result(self) -> Continuation:
        """The whole answer, or what went wrong."""
        assert self._future is not None
        return await self._future

    def _run(self) -> Continuation:
        self.queue_seconds = time.perf_counter() - self._asked
        if self._abandoned.is_set():
            raise _Abandoned
        answer = self._receiver.answer(self._max_new_tokens, self._say)
        self._note_first_token()
        self.busy_seconds = time.perf_counter() - self._asked - self.queue_seconds
        return answer

    def _say(self, token_id: int, text: str) -> None:
        if self._abandoned.is_set():
            raise _Abandoned
        self._note_first_token()
        self._loop.call_soon_threadsafe(self._tokens.put_nowait, (token_id, text))

    def _note_first_token(self) -> None:
        self.first_token_seconds = self.first_token_seconds or time.perf_counter() - self._asked

    def _ended(self, future: asyncio.Future[Continuation]) -> None:
        if not future.cancelled():
            future.exception()  # an abandoned one is never asked for
        self._tokens.put_nowait(None)


class Engine:
    """Runs receivers' work in threads, so that the event loop never waits for arithmetic.

    Parameters
    ----------
    max_waiting : int
        Answers that may wait for the model, beside the one it works on; more are refused with BusyError.
    """

    def __init__(self, max_waiting: int = 16) -> None:
        self._model = ThreadPoolExecutor(1, thread_name_prefix="kvferry-model")
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="kvferry-decode")
        self._max_waiting = max_waiting
        self._present = 0
        self._usual_seconds = 0.0

    @property
    def present(self) -> int:
        """Questions that wait for the model or are being answered."""
        return self._present

    @property
    def queue_seconds(self) -> float:
        """How long a question that came now would wait: for those present, at what an answer usually takes."""
        return self._present * self._usual_seconds

    async def decode(self, work: Callable[..., T], *args: object) -> T:
        """Run short work beside the model."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, lambda: work(*args))

    @asynccontextmanager
    async def answering(self, receiver: Receiver, max_new_tokens: int) -> AsyncIterator[Answering]:
        """An answer under way; leaving the context before its end abandons it."""
        if self._present > self._max_waiting:
            raise BusyError(f"{self._present} questions are before this one; try again in a while")
        under_way = Answering(receiver, max_new_tokens)
        self._present += 1
        try:
            under_way.begin(self._model)
            yield under_way
        finally:
            self._present -= 1
            under_way.abandon()
            if under_way.busy_seconds:
                usual = self._usual_seconds or under_way.busy_seconds
                self._usual_seconds = NEWEST * under_way.busy_seconds + (1 - NEWEST) * usual

    def close(self) -> None:
        """Wait for running work, which ends soon once its requests have been cancelled."""
        self._model.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)
