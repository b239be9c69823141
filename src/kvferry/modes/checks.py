"""What every mode checks of a question, and how bytes are cut into messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvferry.errors import InputError
from kvferry.modes.base import CHUNK_BYTES, MAX_ITEMS


def cut(pieces: Iterable[bytes], limit: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The same bytes in pieces of at most ``limit``; small pieces are left as they are, so that none waits."""
    for piece in pieces:
        for begin in range(0, len(piece), limit):
            yield piece[begin : begin + limit]


def check_question(text: str) -> None:
    """Refuse an empty question, on either end."""
    if not text.strip():
        raise InputError("the question is empty; ask something")


def check_count(pictures: int) -> None:
    """Refuse more pictures than one question takes."""
    if pictures > MAX_ITEMS:
        raise InputError(f"{pictures} pictures at once; at most {MAX_ITEMS} are taken")
