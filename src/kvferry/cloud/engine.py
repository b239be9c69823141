"""The model behind the server: answers are decoded together, in a thread of its own, with a bounded line before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from kvferry.cloud.schedule import Schedule
from kvferry.cloud.work import Work
from kvferry.modes import BusyError, Receiver

if TYPE_CHECKING:
    from kvferry.models import VLM, Continuation

T = TypeVar("T")
DECODERS = 2
NEWEST = 0.3
"""Weight of the newest answer in what answers usually take."""


class Answering:
    """One answer under way: iterate over its tokens (id, text), then take the :meth:`result`.

    Tokens wait here for a reader that is slow, at most as many as were asked for; the model does not.

    Attributes
    ----------
    work : Work
        With its times.
    """

    def __init__(self, vlm: VLM, receiver: Receiver, max_new_tokens: int, identity: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        self._future: asyncio.Future[Continuation] = self._loop.create_future()
        self._future.add_done_callback(lambda x: x.cancelled() or x.exception())  # an abandoned one is never asked for
        self.work = Work(vlm, receiver, max_new_tokens, identity, self._say, self._end)

    async def __aiter__(self) -> AsyncIterator[tuple[int, str]]:
        while (token := await self._tokens.get()) is not None:
            yield token

    async def result(self) -> Continuation:
        """The whole answer, or what went wrong."""
        return await self._future

    def _say(self, token_id: int, text: str) -> None:
        self._loop.call_soon_threadsafe(self._tokens.put_nowait, (token_id, text))

    def _end(self, answer: Continuation | None, error: BaseException | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._settle, answer, error)

    def _settle(self, answer: Continuation | None, error: BaseException | None) -> None:
        if not self._future.done():
            if answer is not None:
                self._future.set_result(answer)
            else:
                self._future.set_exception(error or RuntimeError("no answer"))
        self._tokens.put_nowait(None)


class Engine:
    """Runs receivers' work in threads, so that the event loop never waits for arithmetic.

    Parameters
    ----------
    max_waiting : int
        Answers that may wait for the model, beside those it works on; more are refused with BusyError.
    together : int
        Answers that it works on at once.
    """

    def __init__(self, max_waiting: int = 16, together: int = 16) -> None:
        self._schedule = Schedule(together)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="kvferry-decode")
        self._most = max_waiting + together
        self._together = together
        self._present = 0
        self._usual_seconds = 0.0

    @property
    def present(self) -> int:
        """Questions that wait for the model or are being answered."""
        return self._present

    @property
    def queue_seconds(self) -> float:
        """How long a question that came now would wait: for those present, at what an answer usually takes."""
        return max(self._present + 1 - self._together, 0) * self._usual_seconds / self._together

    async def decode(self, work: Callable[..., T], *args: object) -> T:
        """Run short work beside the model."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, lambda: work(*args))

    @asynccontextmanager
    async def answering(
        self, vlm: VLM, receiver: Receiver, max_new_tokens: int, identity: str = ""
    ) -> AsyncIterator[Answering]:
        """An answer under way; leaving the context before its end abandons it.

        Raises
        ------
        BusyError
            Too many are before it.
        """
        if self._present >= self._most:
            raise BusyError(f"{self._present} questions are before this one; try again in a while")
        under_way = Answering(vlm, receiver, max_new_tokens, identity)
        self._present += 1
        try:
            self._schedule.add(under_way.work)
            yield under_way
        finally:
            self._present -= 1
            under_way.work.abandon()
            if seconds := under_way.work.busy_seconds:
                self._usual_seconds = NEWEST * seconds + (1 - NEWEST) * (self._usual_seconds or seconds)

    def close(self) -> None:
        """Abandon what runs, at its next step."""
        self._schedule.close()
        self._decoders.shutdown(cancel_futures=True)
