"""An answer token by token, and how to want it no longer."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from kvferry.edge.answer import Answer
from kvferry.errors import CancelledError, InputError

if TYPE_CHECKING:
    from kvferry.edge.client import Edge
    from kvferry.modes import OnToken

T = TypeVar("T")


class Cancel:
    """Calls a question off, from any thread: pass it to :meth:`kvferry.Edge.ask`, then call :meth:`cancel`.

    The cloud stops at once, where the question is there already; the edge's own model finishes the pass it is in.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cancelled = False
        self._stop: Callable[[], object] | None = None
        self._woken = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether it was."""
        return self._cancelled

    def cancel(self) -> None:
        """Call the question off; once is enough."""
        with self._lock:
            self._cancelled = True
            stop = self._stop
        self._woken.set()
        if stop is not None:
            stop()

    def check(self) -> None:
        """Raise CancelledError if it was called off."""
        if self._cancelled:
            raise CancelledError("the question was called off")

    def wait(self, seconds: float) -> None:
        """Let time pass; CancelledError as soon as it is called off."""
        self._woken.wait(seconds)
        self.check()

    def heeded(self, on_token: OnToken | None) -> OnToken:
        """``on_token``, ending what calls it once the question was called off."""

        def speak(token: int, text: str) -> None:
            self.check()
            if on_token is not None:
                on_token(token, text)

        return speak

    def stops(self, stop: Callable[[], object]) -> None:
        """What ends the call that is under way."""
        with self._lock:
            self._stop = stop
        if self._cancelled:
            stop()


class Stream(Iterator[str]):
    """The pieces of an answer as they come; :meth:`kvferry.Edge.stream` makes it.

    What went wrong is raised by the iteration. Leaving a ``with`` block, or dropping the stream, calls the question
    off.
    """

    def __init__(self, ask: Callable[..., Answer]) -> None:
        self._pieces: queue.SimpleQueue[str | Answer | BaseException] = queue.SimpleQueue()
        self._end: Answer | BaseException | None = None
        self._cancel = Cancel()
        # it must not hold the stream itself, or a stream that nobody wants would never be dropped
        self._thread = threading.Thread(target=_fill, args=(ask, self._pieces, self._cancel), daemon=True)
        self._thread.start()

    def __next__(self) -> str:
        if self._end is None:
            piece = self._pieces.get()
            if isinstance(piece, str):
                return piece
            self._end = piece
        if isinstance(self._end, BaseException):
            raise self._end
        raise StopIteration

    @property
    def answer(self) -> Answer:
        """The whole answer and what it cost; waits for it."""
        for _ in self:
            pass
        if not isinstance(self._end, Answer):
            raise InputError("there is no answer")
        return self._end

    def cancel(self) -> None:
        """Call the question off: the cloud is free at once, and the iteration raises CancelledError."""
        self._cancel.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()
        self._thread.join()

    def __del__(self) -> None:
        self._cancel.cancel()


def _fill(ask: Callable[..., Answer], pieces: queue.SimpleQueue[Any], cancel: Cancel) -> None:
    try:
        said: list[str] = []

        def speak(_: int, text: str) -> None:
            said.append(text)
            if text:
                pieces.put(text)

        answer = ask(on_token=speak, cancel=cancel)
        if rest := answer.text.removeprefix("".join(said)):
            pieces.put(rest)
        pieces.put(answer)
    except BaseException as error:
        pieces.put(error)


class AsyncEdge:
    """:class:`kvferry.Edge` for asyncio. Its questions are asked one after the other, in a thread of its own.

    Cancelling a task that waits for an answer calls the question off.

    Parameters
    ----------
    *arguments, **options
        Those of :class:`kvferry.Edge`; or the edge itself.

    Examples
    --------
    >>> async with AsyncEdge(vlm, "127.0.0.1:7421") as edge:  # doctest: +SKIP
    ...     print((await edge.ask(["scene.png"], "what colour is the circle?", deadline=5)).text)
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        from kvferry.edge.client import Edge

        given = len(arguments) == 1 and isinstance(arguments[0], Edge) and not options
        self._edge: Edge = arguments[0] if given else Edge(*arguments, **options)
        self._worker = ThreadPoolExecutor(1, "kvferry-edge")

    async def ask(self, images: Any = (), question: str = "", **options: Any) -> Answer:
        """:meth:`kvferry.Edge.ask`; ``on_token`` and ``on_sent`` are called in the edge's thread."""
        cancel = options.pop("cancel", None) or Cancel()
        try:
            return await self._run(partial(self._edge.ask, images, question, cancel=cancel, **options))
        except asyncio.CancelledError:
            cancel.cancel()
            raise

    async def stream(self, images: Any = (), question: str = "", **options: Any) -> Any:
        """The pieces of an answer: ``async for piece in edge.stream(...)``; leaving the loop calls the question off."""
        loop, pieces, cancel = asyncio.get_running_loop(), asyncio.Queue[str | None](), Cancel()

        def speak(_: int, text: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, text)

        asking = asyncio.ensure_future(self.ask(images, question, on_token=speak, cancel=cancel, **options))
        asking.add_done_callback(lambda _: pieces.put_nowait(None))
        said = ""
        try:
            while (text := await pieces.get()) is not None:
                said += text
                if text:
                    yield text
            if rest := (await asking).text.removeprefix(said):
                yield rest
        finally:
            cancel.cancel()
            await asyncio.wait([asking])

    async def describe(self) -> dict[str, Any]:
        """:meth:`kvferry.Edge.describe`."""
        return await self._run(self._edge.describe)

    async def close(self) -> None:
        """Close the edge, after the question that is under way."""
        await self._run(self._edge.close)
        self._worker.shutdown()

    def _run(self, work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(self._worker, work)

    async def __aenter__(self) -> AsyncEdge:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
