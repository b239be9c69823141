"""How long the model will have to work on a question, as measured here: what cannot end in time is not begun."""

from __future__ import annotations

from collections import deque

from kvferry.errors import DeadlineError

RECENT = 32
"""Passes, and answers, that are remembered."""
ENOUGH = 8
"""Answers from which on something is known of how long they are."""


class Forecast:
    """A lower bound on the model's time, from the fastest of the recent passes and the shortest of the recent answers.

    Other machines' figures mean nothing here, and others' questions may end: so a question is refused only where even
    alone, at the best speed that was seen, it would be too late.
    """

    def __init__(self) -> None:
        self._reading: deque[float] = deque(maxlen=RECENT)
        self._saying: deque[float] = deque(maxlen=RECENT)
        self._answers: deque[tuple[int, bool]] = deque(maxlen=RECENT)

    def read(self, tokens: int, seconds: float) -> None:
        """A pass over so many tokens of a prompt took so long."""
        self._reading.append(seconds / tokens)

    def said(self, seconds: float) -> None:
        """A step that gave every answer one more token took so long."""
        self._saying.append(seconds)

    def ended(self, tokens: int, by_itself: bool) -> None:
        """An answer of so many tokens is over: the model said so, or it was cut off there."""
        self._answers.append((tokens, by_itself))

    def answer_tokens(self, most: int) -> int:
        """What an answer of at most so many tokens will have at least, if it is as those before it."""
        if len(self._answers) < ENOUGH:
            return 1
        lengths = sorted((tokens for tokens, _ in self._answers), reverse=True)
        seen = [lengths[ENOUGH - 1], *(tokens for tokens, by_itself in self._answers if by_itself)]
        return max(min(most, *seen), 1)

    def seconds(self, read: int, most: int) -> float:
        """To read so many tokens of a prompt and answer; 0 for what was never measured."""
        reading, saying = min(self._reading, default=0.0), min(self._saying, default=0.0)
        return read * reading + self.answer_tokens(most) * saying

    def check(self, read: int, most: int, left: float) -> None:
        """Refuse a question that cannot be answered in time.

        Parameters
        ----------
        read : int
            Tokens that are known to be read for it.
        most : int
            Tokens that its answer may have.
        left : float
            Seconds to its deadline.

        Raises
        ------
        DeadlineError
        """
        if (takes := self.seconds(read, most)) > left:
            raise DeadlineError(
                f"reading {read:,} tokens and saying {self.answer_tokens(most):,} takes {takes:.1f} s here at the "
                f"least, and {max(left, 0.0):.1f} s are left: allow more time, show less, or ask for a shorter answer"
            )
