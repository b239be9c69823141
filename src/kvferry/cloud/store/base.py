"""What a store is."""

from __future__ import annotations

from typing import Protocol


class Store(Protocol):
    """Blobs by session and number. A session's blobs and the count of its numbers live and die together, so that a
    number that a session has once given out never means anything else. Safe to use from several threads.

    Raises OSError (of which those of sockets are) for whatever goes wrong in it.
    """

    def reserve(self, session: str, count: int) -> int:
        """The first of ``count`` numbers that nobody was ever given for this session; 1 for a new one."""
        ...

    def get(self, session: str, number: int) -> bytes | None:
        """What was put there, if it is there still; the session counts as used."""
        ...

    def put(self, session: str, number: int, blob: bytes) -> None:
        """Keep a blob in a session whose numbers have been reserved; if that has been forgotten, nothing is kept."""
        ...

    def drop(self, session: str, number: int) -> None:
        """Forget one."""
        ...

    def close(self) -> None:
        """No more is asked of it."""
        ...
