"""What an edge knows of its session: what the cloud holds, by which handle, and what the edge noted about it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from kvferry.wire import service_pb2 as pb

MOST = 1024
"""Things that are remembered; the least recently used is forgotten first, and would be sent again."""


class Holdings:
    """The edge's side of a session. It only ever saves bytes: what it wrongly believes to be held is sent again.

    Parameters
    ----------
    hold : bool
        Ask the cloud to keep what is sent. Otherwise nothing is ever held.
    """

    def __init__(self, hold: bool = True) -> None:
        self.hold = hold
        self.session = b""
        self._handles: OrderedDict[bytes, int] = OrderedDict()
        self._notes: OrderedDict[bytes, Any] = OrderedDict()

    def handle(self, digest: bytes) -> int:
        """The handle of what has this digest; 0 where the cloud is not known to hold it."""
        if digest in self._handles:
            self._handles.move_to_end(digest)
        return self._handles.get(digest, 0)

    def item(self, digest: bytes, nbytes: int = 0, size: tuple[int, int] = (0, 0)) -> pb.AskRequest.Item:
        """How a request names it: by its handle where it is held, else by its digest, and what is to be known of a
        picture file before it comes: its bytes, and its width and height."""
        if handle := self.handle(digest):
            return pb.AskRequest.Item(handle=handle)
        return pb.AskRequest.Item(digest=digest, size=nbytes, width=size[0], height=size[1])

    def note(self, digest: bytes, value: Any) -> None:
        """Remember ``value`` about what has this digest."""
        _remember(self._notes, digest, value)

    def noted(self, digest: bytes) -> Any:
        """What was noted about it, or None."""
        return self._notes.get(digest)

    def learn(self, done: pb.AskReply.Done) -> None:
        """Take in what the cloud says it holds now."""
        if done.session != self.session:
            self.forget()
            self.session = done.session
        for holding in done.holdings:
            _remember(self._handles, holding.digest, holding.handle)

    def forget(self) -> None:
        """The session is lost: nothing is held any more. Notes say nothing about that, and stay."""
        self.session = b""
        self._handles.clear()


def _remember(where: OrderedDict[bytes, Any], key: bytes, value: Any) -> None:
    where[key] = value
    where.move_to_end(key)
    if len(where) > MOST:
        where.popitem(last=False)
