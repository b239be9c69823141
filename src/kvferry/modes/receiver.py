"""What the cloud's halves of the modes share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from kvferry.errors import DeadlineError
from kvferry.modes.base import OnToken

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.models import VLM, Continuation
    from kvferry.models.steps import Pace, Steps


class ModeReceiver(ABC):
    """What the receivers of all modes have in common: they answer from a cache."""

    _vlm: VLM
    prefill_seconds: float = 0.0
    note: str = ""

    @property
    def reads(self) -> int:
        """See :class:`kvferry.modes.base.Receiver`."""
        return 0

    @property
    def bf16_bytes(self) -> int:
        """See :class:`kvferry.modes.base.Receiver`."""
        return 0

    @abstractmethod
    def feed(self, data: bytes) -> None:
        """See :meth:`Receiver.feed`."""

    @abstractmethod
    def finish(self) -> None:
        """See :meth:`Receiver.finish`."""

    @abstractmethod
    def settle(self) -> float:
        """See :meth:`Receiver.settle`."""

    @abstractmethod
    def ground(self) -> tuple[KVCache, str | None]:
        """The cache to answer from, and the question where the cache does not hold it."""

    def grounding(self, pace: Pace) -> Steps[tuple[KVCache, str | None]]:
        """:meth:`ground` in steps of the model; here it is one."""
        yield
        return self.ground()

    keeps: bool = False
    """Whether :meth:`ended` wants the cache that an answer leaves."""

    def ended(self, done: Continuation) -> None:  # noqa: B027, most have nothing to do
        """The answer is there."""

    def answer(self, max_new_tokens: int, on_token: OnToken) -> Continuation:
        """See :meth:`Receiver.answer`."""
        cache, question = self.ground()
        return self._vlm.resume(cache, question, max_new_tokens=max_new_tokens, on_token=on_token)


class NeedsAll(ModeReceiver):
    """A receiver that can do nothing with the beginning of what was sent; :meth:`ground` or :meth:`grounding` is its
    own."""

    def ground(self) -> tuple[KVCache, str | None]:
        """See :class:`ModeReceiver`."""
        from kvferry.models.steps import Pace, finished

        return finished(self.grounding(Pace()))

    def settle(self) -> float:
        """See :meth:`Receiver.settle`."""
        raise DeadlineError(
            "the time to answer came before everything had arrived; allow more time, or send a cache in tiers (mode kv)"
        )
