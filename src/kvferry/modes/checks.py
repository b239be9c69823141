"""What every mode checks of a question, and how bytes are cut into messages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvferry.errors import InputError
from kvferry.modes.base import CHUNK_BYTES, MAX_ITEMS
from kvferry.wire import service_pb2 as pb

TOKEN_CHARACTERS = 16
"""Characters that a token of running text never exceeds on average."""
TURN_TOKENS = 2
"""That any template writes around a turn's question, which has one at least."""


def cut(pieces: Iterable[bytes], limit: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The same bytes in pieces of at most ``limit``; small pieces are left as they are, so that none waits."""
    for piece in pieces:
        for begin in range(0, len(piece), limit):
            yield piece[begin : begin + limit]


def check_question(text: str, longest: int = 0) -> None:
    """Refuse an empty question, on either end, and one that a model with ``longest`` positions cannot read (0: any)."""
    if not text.strip():
        raise InputError("the question is empty; ask something")
    if longest and len(text) > TOKEN_CHARACTERS * longest:
        raise InputError(f"a question of {len(text):,} characters is more than this model reads; shorten it")


def check_turns(turns: Sequence[pb.AskRequest.Turn], longest: int) -> None:
    """Refuse a conversation longer than a model with ``longest`` positions reads (0: any), before it is read."""
    least = len(turns) * (1 + TURN_TOKENS)
    said = least if longest and least > longest else sum(max(len(turn.answer), 1) + TURN_TOKENS for turn in turns)
    if longest and (said > longest or _words(turns) > TOKEN_CHARACTERS * longest):
        raise InputError(
            f"a conversation of {len(turns):,} turns with {said:,} tokens is more than this model's {longest:,} "
            "positions; begin a new one"
        )


def check_count(pictures: int) -> None:
    """Refuse more pictures than one question takes."""
    if pictures > MAX_ITEMS:
        raise InputError(f"{pictures} pictures at once; at most {MAX_ITEMS} are taken")


def _words(turns: Sequence[pb.AskRequest.Turn]) -> int:
    return sum(len(turn.text) + len(turn.question) for turn in turns)
