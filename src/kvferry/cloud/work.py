"""One question's work on the model, in steps, with what the rest of the process may see of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvferry.modes import Receiver

if TYPE_CHECKING:
    from kvferry.models import VLM, Continuation
    from kvferry.models.replies import Reply
    from kvferry.models.steps import Pace, Steps

OnToken = Callable[[int, str], None]
OnEnd = Callable[["Continuation | None", "BaseException | None"], None]


class AbandonedError(Exception):
    """Nobody waits for this answer any more."""


class Work:
    """A question that waits for the model, or that the model works on.

    Parameters
    ----------
    identity : str
        Whose question it is: those of different edges take turns.
    on_token, on_end : callable
        Called in the model's thread; the second exactly once.

    Attributes
    ----------
    queue_seconds, first_token_seconds : float
        From asking until the model began, and until the first token (or the end, if there was none).
    busy_seconds : float
        How long the model's own steps for it took, those that it shared with others in full.
    """

    def __init__(
        self,
        vlm: VLM,
        receiver: Receiver,
        max_new_tokens: int,
        identity: str,
        on_token: OnToken,
        on_end: OnEnd,
    ) -> None:
        self.identity = identity
        self.vlm = vlm
        self.receiver = receiver
        self.queue_seconds = self.first_token_seconds = self.busy_seconds = 0.0
        self.attained = 0.0
        self.steps: Steps[Reply | Continuation] | None = None
        self.reply: Reply | None = None
        self.max_new_tokens = max_new_tokens
        self._on_token = on_token
        self._on_end = on_end
        self._asked = self._began = time.perf_counter()
        self._abandoned = threading.Event()
        self._ended = False
        self._stream: Any = None

    @property
    def abandoned(self) -> bool:
        """Whether it is to end at its next step."""
        return self._abandoned.is_set()

    def abandon(self) -> None:
        """End at the next step; from any thread."""
        self._abandoned.set()

    def begin(self, pace: Pace) -> None:
        """The model turns to it."""
        from kvferry.models.stream import TextStream

        self._began = time.perf_counter()
        self.queue_seconds = self._began - self._asked
        self._stream = TextStream(self.vlm.tokenizer, self._say)
        self.steps = self._steps(pace)

    def _steps(self, pace: Pace) -> Steps[Reply | Continuation]:
        """Up to an answer that is ready to be decoded with others; to its end where a mode decodes by itself."""
        from kvferry.models.replies import replying

        receiver: Any = self.receiver
        if not hasattr(receiver, "grounding"):
            yield
            return self.receiver.answer(self.max_new_tokens, self._say)
        cache, question = yield from receiver.grounding(pace)
        return (
            yield from replying(
                self.vlm, cache, question, self.max_new_tokens, self._stream.add, pace, keep=receiver.keeps
            )
        )

    def done(self, reply: Reply) -> None:
        """The model has said all of it, or failed."""
        from kvferry.models import Continuation

        if reply.failure is not None:
            self.end(None, reply.failure)
            return
        try:
            text, seconds = self._stream.finish(), time.perf_counter() - self._began
            self._note_first_token()
            first = self.first_token_seconds - self.queue_seconds
            answer = Continuation(text, tuple(reply.said), first, seconds, reply.kept)
            ended = getattr(self.receiver, "ended", None)
            if ended is not None:
                ended(answer)
        except Exception as error:
            self.end(None, error)
        else:
            self.end(answer, None)

    def end(self, answer: Continuation | None, error: BaseException | None) -> None:
        """Tell whoever waits; later calls say nothing."""
        if not self._ended:
            self._ended = True
            self._note_first_token()
            if self.steps is not None:
                self.steps.close()
            self.steps = self.reply = None
            self._on_end(answer, error)

    def _say(self, token_id: int, text: str) -> None:
        if self.abandoned:
            raise AbandonedError
        self._note_first_token()
        self._on_token(token_id, text)

    def _note_first_token(self) -> None:
        self.first_token_seconds = self.first_token_seconds or time.perf_counter() - self._asked
