"""Text from tokens as they come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class TextStream:
    """Turns tokens into text piece by piece; a piece waits until its last character is complete."""

    def __init__(self, tokenizer: Any, on_token: Callable[[int, str], None] | None) -> None:
        self._tokenizer = tokenizer
        self._on_token = on_token
        self._ids: list[int] = []
        self._text = ""

    def add(self, token: int) -> None:
        """One token more; hands it on with what it adds to the text."""
        self._ids.append(token)
        if self._on_token is None:
            return
        text = self.finish()
        piece = "" if text.endswith("\ufffd") or not text.startswith(self._text) else text[len(self._text) :]
        self._text = self._text + piece
        self._on_token(token, piece)

    def finish(self) -> str:
        """The text so far."""
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))
