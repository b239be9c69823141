"""The model behind the server: answers are decoded together, in a thread of its own, with a bounded line before it."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, TypeVar

from kvferry.cloud.line import Line, Place
from kvferry.cloud.schedule import Schedule
from kvferry.cloud.work import Work
from kvferry.cloud.workshop import Workshop
from kvferry.modes import Receiver

if TYPE_CHECKING:
    from kvferry.models import VLM, Continuation

T = TypeVar("T")
DECODERS = 2
PATIENCE = 10
"""By how much less urgent heavy work is to the system (Linux only: elsewhere the priority is that of all threads)."""


def _give_way() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PATIENCE)


class Answering:
    """One answer under way: iterate over its tokens (id, text), then take the :meth:`result`.

    Tokens wait here for a reader that is slow, at most as many as were asked for; the model does not.

    Attributes
    ----------
    work : Work
        With its times.
    """

    def __init__(
        self, vlm: VLM, receiver: Receiver, max_new_tokens: int, identity: str, over: Callable[[Work], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._tokens: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
        self._future: asyncio.Future[Continuation] = self._loop.create_future()
        self._future.add_done_callback(lambda x: x.cancelled() or x.exception())  # an abandoned one is never asked for
        self._over = over
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
        self._over(self.work)
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
        Questions that may be on their way or wait for the model, beside those it works on.
    together : int
        Questions that it works on at once.
    """

    def __init__(self, max_waiting: int = 16, together: int = 16) -> None:
        self.schedule = Schedule(together)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="kvferry-decode")
        self._aside = ThreadPoolExecutor(1, thread_name_prefix="kvferry-aside", initializer=_give_way)
        self._line = Line(max_waiting + together, together)
        self.workshop = Workshop()

    @property
    def present(self) -> int:
        """Questions that have a place: on their way, waiting for the model, or being answered."""
        return len(self._line)

    @property
    def queue_seconds(self) -> float:
        """How long a question that came now would wait for the model."""
        return self._line.queue_seconds

    @property
    def stuck_seconds(self) -> float:
        """How long the model's present step has taken; about 0 where there is nothing to do."""
        return time.monotonic() - self.schedule.stepped_at if self.schedule.busy else 0.0

    async def decode(self, work: Callable[..., T], *args: object, heavy: bool = False) -> T:
        """Run short work beside the model; ``heavy`` work goes one after the other, and gives way to all else."""
        pool = self._aside if heavy else self._decoders
        return await asyncio.get_running_loop().run_in_executor(pool, lambda: work(*args))

    @contextmanager
    def place(self, identity: str = "") -> Iterator[Place]:
        """A place in the line, to be taken before a question's bytes come.

        Raises
        ------
        BusyError
            There is none now.
        """
        place = self._line.enter(identity)
        try:
            yield place
        finally:
            self._line.leave(place)

    @asynccontextmanager
    async def answering(
        self, vlm: VLM, receiver: Receiver, max_new_tokens: int, place: Place
    ) -> AsyncIterator[Answering]:
        """An answer under way; leaving the context before its end abandons it.

        The place is given back when the model is done, whether or not a slow reader has read all of it.
        """

        def over(work: Work) -> None:
            self._line.leave(place, work.busy_seconds)

        under_way = Answering(vlm, receiver, max_new_tokens, place.identity, over)
        try:
            self.schedule.add(under_way.work)
            yield under_way
        finally:
            under_way.work.abandon()

    def close(self) -> None:
        """Abandon what runs, at its next step."""
        self.schedule.close()
        self.workshop.close()
        self._decoders.shutdown(cancel_futures=True)
        self._aside.shutdown(cancel_futures=True)
