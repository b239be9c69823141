"""Whose step is next: one thread that decodes all answers together and reads prompts in between."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from typing import TYPE_CHECKING

from kvferry.cloud.forecast import Forecast
from kvferry.cloud.work import AbandonedError, Work

if TYPE_CHECKING:
    from kvferry.models.replies import Replies
    from kvferry.models.steps import Pace

log = logging.getLogger(__name__)
TURN_SECONDS = 0.25
"""A prompt is read so long before the next one has a turn."""


class Schedule:
    """The model's thread.

    Up to ``together`` questions are worked on at once. The others wait in one line for each edge, and the edges take
    turns: who asks a hundred things waits for himself. A step of decoding all answers under way and a step of reading
    one prompt alternate; prompts take turns of :data:`TURN_SECONDS`, so that a long one does not hold up short ones.

    Parameters
    ----------
    together : int
        At least 1.
    """

    def __init__(self, together: int) -> None:
        self._together = together
        self._changed = threading.Condition()
        self._lines: OrderedDict[str, deque[Work]] = OrderedDict()
        self._reading: deque[Work] = deque()
        self._saying: dict[int, Work] = {}
        self._replies: Replies | None = None
        self._pace: Pace | None = None
        self._closed = False
        self.forecast = Forecast()
        self.stepped_at = time.monotonic()
        """When the last step ended, or there was nothing to do: what tells a model that is stuck."""
        self._thread = threading.Thread(target=self._run, name="kvferry-model", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._lines or self._reading or self._saying)

    def add(self, work: Work) -> None:
        """Stand in line."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the engine was closed")
            self._lines.setdefault(work.identity, deque()).append(work)
            self._changed.notify()

    def close(self) -> None:
        """Abandon everything; waits for the step that runs."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self.busy or self._closed):
                    self.stepped_at = time.monotonic()
                    self._changed.wait(1.0)
                if self._closed:
                    break
                self._admit()
            try:
                self._drop_abandoned()
                self._decode()
                self._read()
            except Exception:  # a fault of this very module must not end the thread
                log.exception("the schedule failed")
                self._end_all(RuntimeError("the schedule failed"))
            self.stepped_at = time.monotonic()
        self._end_all(AbandonedError())

    def _admit(self) -> None:
        """Whoever waited longest of the edge whose turn it is; called under the lock."""
        while self._lines and len(self._reading) + len(self._saying) < self._together:
            identity, line = self._lines.popitem(last=False)
            work = line.popleft()
            if line:
                self._lines[identity] = line
            if work.abandoned:
                work.end(None, AbandonedError())
                continue
            work.begin(self._paced())
            self._reading.append(work)

    def _paced(self) -> Pace:
        if self._pace is None:
            from kvferry.models.steps import Pace

            self._pace = Pace(heard=self.forecast.read)
        return self._pace

    def _drop_abandoned(self) -> None:
        for work in [x for x in self._reading if x.abandoned]:
            self._reading.remove(work)
            work.end(None, AbandonedError())
        for key, work in [(k, x) for k, x in self._saying.items() if x.abandoned]:
            del self._saying[key]
            if self._replies is not None and work.reply is not None:
                self._replies.drop(work.reply)
            work.end(None, AbandonedError())

    def _decode(self) -> None:
        """One token for those whose turn it is."""
        if self._replies is None or not self._saying:
            return
        began = time.perf_counter()
        over = self._replies.step()
        seconds = time.perf_counter() - began
        self.forecast.said(seconds)
        for work in self._saying.values():
            work.busy_seconds += seconds
        for reply in over:
            work = self._saying.pop(id(reply))
            if reply.failure is None:
                self.forecast.ended(len(reply.said), len(reply.said) < work.max_new_tokens)
            work.done(reply)

    def _read(self) -> None:
        """One step of the prompt whose turn it is."""
        if not self._reading:
            return
        work = self._reading[0]
        assert work.steps is not None
        began = time.perf_counter()
        try:
            next(work.steps)
        except StopIteration as end:
            self._reading.popleft()
            self._ready(work, end.value)
            return
        except BaseException as error:
            self._reading.popleft()
            work.end(None, error)
            return
        seconds = time.perf_counter() - began
        work.busy_seconds += seconds
        work.attained += seconds
        if work.attained > TURN_SECONDS:
            work.attained = 0.0
            self._reading.rotate(-1)

    def _ready(self, work: Work, value: object) -> None:
        from kvferry.models.replies import Replies, Reply

        if not isinstance(value, Reply):
            work.end(value, None)  # type: ignore[arg-type]
            return
        try:
            if self._replies is None:
                self._replies = Replies(work.vlm.model, self._together)
            self._replies.add(value)
        except Exception as error:
            work.end(None, error)
            return
        work.reply = value
        self._saying[id(value)] = work

    def _end_all(self, error: BaseException) -> None:
        with self._changed:
            waiting = [work for line in self._lines.values() for work in line]
            self._lines.clear()
        for work in [*waiting, *self._reading, *self._saying.values()]:
            work.end(None, error)
        self._reading.clear()
        self._saying.clear()
        self._replies = None
