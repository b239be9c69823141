"""What a cloud keeps for edges that ask again: bounded in bytes, in time, and by session."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from kvferry.bitstream.bounds import no_reserve
from kvferry.cloud.limits import Limits
from kvferry.cloud.store.backing import BLOCK, Backing
from kvferry.modes import NotHeldError, ProtocolError
from kvferry.pictures.apart import OpenPicture, open_wire_picture
from kvferry.wire import service_pb2 as pb

T = TypeVar("T")
ID_BYTES = 16
LAST = 2**32 - 1
"""The largest handle that there is."""
OVERHEAD = 1024
"""Bytes that anything held counts beside its own, so that many small things are bounded too."""


@dataclass
class _Held:
    item: object
    digest: bytes
    nbytes: int


@dataclass
class _Session:
    """What one edge is kept; handles count up and are never used again."""

    used_at: float
    owner: str
    items: OrderedDict[int, _Held] = field(default_factory=OrderedDict)
    nbytes: int = 0
    next_handle: int = 1
    last_handle: int = LAST
    stored: bool = False


class Sessions:
    """All sessions of a cloud. Safe to use from several threads.

    A session's id is 16 random bytes that only the edge it was made for is told; whoever does not know it can neither
    read nor guess that the session exists, and nothing is shared between sessions, not even equal pictures. Where edges
    have names (tokens, certificates), an id is worth nothing to any other than the one that opened the session.

    Where there is no room, the least recently used goes first: of the session itself where it has reached its own
    limit, else whole sessions, the one unused for longest first.

    Parameters
    ----------
    limits : Limits
        ``held_bytes``, ``session_bytes`` and ``session_seconds``, of what is in memory.
    backing : Backing, optional
        Where what is held is stored too: what is not in memory any more is looked for there.
    clock : callable
        Seconds that only go forward.
    """

    def __init__(
        self, limits: Limits, clock: Callable[[], float] = time.monotonic, backing: Backing | None = None
    ) -> None:
        self._limits = limits
        self._backing = backing
        self._clock = clock
        self._lock = threading.Lock()
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes held for all sessions together."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._sessions)

    def store(
        self,
        session: bytes,
        hold: bool,
        owner: str = "",
        reserve: Callable[[int], None] = no_reserve,
        open_picture: OpenPicture = open_wire_picture,
    ) -> SessionShelf:
        """What a request of ``owner`` sees of the session it names; an unknown name, or that of somebody else's
        session, is that of a session that holds nothing. ``reserve`` is what the request may take, ``open_picture``
        where pictures are decoded for it."""
        return SessionShelf(self, session, hold, owner, reserve, open_picture)

    def expire(self) -> None:
        """Forget sessions that nobody has used for ``session_seconds``."""
        with self._lock:
            self._expire()

    def take(self, session: bytes, handle: int, kind: type[T], owner: str = "") -> T:
        """See :meth:`kvferry.modes.base.SessionStore.take`."""
        with self._lock:
            self._expire()
            held = self._found(session, handle, owner)
        if held is None:
            held = self._fetched(session, handle, owner)
        if held is None:
            raise NotHeldError(
                "the cloud does not hold that any more (it restarted, or the session was idle or too large); send it "
                "again"
            )
        if not isinstance(held.item, kind):
            raise ProtocolError(f"handle {handle} names no {kind.__name__} in this session; update the edge")
        return held.item

    def put(self, session: bytes, digest: bytes, item: object, nbytes: int, owner: str = "") -> tuple[bytes, int]:
        """Keep ``item``; the session (a new one if the named one is unknown) and the handle, 0 if there is no room."""
        nbytes += OVERHEAD
        with self._lock:
            self._expire()
            if nbytes > min(self._limits.session_bytes, self._limits.held_bytes):
                return session if self._touched(session, owner) else b"", 0
            found = self._touched(session, owner)
            if found is not None:
                for handle, held in found.items.items():
                    if held.digest == digest:
                        found.items.move_to_end(handle)
                        return session, handle
                handle = self._add(session, found, _Held(item, digest, nbytes))
        if found is None:
            session = secrets.token_bytes(ID_BYTES)
            found = self._opened(session, owner)
            with self._lock:
                self._sessions[session] = found  # nobody else knows it yet
                handle = self._add(session, found, _Held(item, digest, nbytes))
        if self._backing is not None and found.stored and handle:
            self._backing.save(session, handle, item, digest, nbytes - OVERHEAD, owner)
        return session, handle

    def drop(self, session: bytes, handle: int, owner: str = "") -> None:
        """See :meth:`kvferry.modes.base.SessionStore.drop`."""
        with self._lock:
            found = self._sessions.get(session)
            if found is not None and found.owner == owner and handle in found.items:
                self._drop(found, handle)
        if self._backing is not None and found is not None and found.owner == owner and found.stored:
            self._backing.drop(session, handle)

    def _opened(self, session: bytes, owner: str) -> _Session:
        """A session that begins, or goes on from what is stored, with handles that it has never given out."""
        first = 0 if self._backing is None else self._backing.reserve(session)
        last = first + BLOCK - 1 if first else LAST
        return _Session(self._clock(), owner, next_handle=first or 1, last_handle=last, stored=bool(first))

    def _found(self, session: bytes, handle: int, owner: str) -> _Held | None:
        found = self._touched(session, owner)
        held = None if found is None else found.items.get(handle)
        if found is not None and held is not None:
            found.items.move_to_end(handle)
        return held

    def _fetched(self, session: bytes, handle: int, owner: str) -> _Held | None:
        """From the store, where it is; it is in memory then, if there is room."""
        entry = None if self._backing is None else self._backing.load(session, handle, owner)
        if entry is None:
            return None
        held = _Held(entry.item, entry.digest, entry.nbytes + OVERHEAD)
        opened = None if session in self._sessions else self._opened(session, owner)
        with self._lock:
            if opened is not None and opened.stored:  # else which handles it has given out is not known
                self._sessions.setdefault(session, opened)
            found = self._touched(session, owner)
            room = held.nbytes <= min(self._limits.session_bytes, self._limits.held_bytes)
            if found is not None and found.stored and room and handle not in found.items:
                self._add(session, found, held, handle)
        return held

    def _add(self, session: bytes, found: _Session, held: _Held, handle: int = 0) -> int:
        """Give it a handle, unless it has one, and make room for it; 0 where no handle is left."""
        if not handle:
            if found.next_handle > found.last_handle:
                return 0
            handle = found.next_handle
            found.next_handle += 1
        found.items[handle] = held
        found.nbytes += held.nbytes
        self._nbytes += held.nbytes
        while found.nbytes > self._limits.session_bytes:
            self._drop_oldest(found)
        while self._nbytes > self._limits.held_bytes:
            self._make_room(session)
        return handle

    def _touched(self, session: bytes, owner: str) -> _Session | None:
        found = self._sessions.get(session)
        if found is None or found.owner != owner:
            return None
        found.used_at = self._clock()
        self._sessions.move_to_end(session)
        return found

    def _expire(self) -> None:
        oldest = self._clock() - self._limits.session_seconds
        while self._sessions and next(iter(self._sessions.values())).used_at < oldest:
            self._forget(next(iter(self._sessions)))

    def _make_room(self, keep: bytes) -> None:
        """Forget the session unused for longest, or of the only one the item unused for longest."""
        first = next(iter(self._sessions))
        if first != keep:
            self._forget(first)
        else:
            self._drop_oldest(self._sessions[keep])

    def _forget(self, session: bytes) -> None:
        self._nbytes -= self._sessions.pop(session).nbytes

    def _drop_oldest(self, session: _Session) -> None:
        self._drop(session, next(iter(session.items)))

    def _drop(self, session: _Session, handle: int) -> None:
        nbytes = session.items.pop(handle).nbytes
        session.nbytes -= nbytes
        self._nbytes -= nbytes


class SessionShelf:
    """One request's view of its session; notes what it brought."""

    def __init__(
        self,
        sessions: Sessions,
        session: bytes,
        hold: bool,
        owner: str = "",
        reserve: Callable[[int], None] = no_reserve,
        open_picture: OpenPicture = open_wire_picture,
    ) -> None:
        self.reserve = reserve
        """See :meth:`kvferry.modes.base.SessionStore.reserve`."""
        self.open_picture = open_picture
        """See :meth:`kvferry.modes.base.SessionStore.open_picture`."""
        self._owner = owner
        self._sessions = sessions
        self._hold = hold
        self.session = session
        self.holdings: list[pb.AskReply.Holding] = []

    def take(self, handle: int, kind: type[T]) -> T:
        """See :meth:`kvferry.modes.base.SessionStore.take`."""
        return self._sessions.take(self.session, handle, kind, self._owner)

    def drop(self, handle: int) -> None:
        """See :meth:`kvferry.modes.base.SessionStore.drop`."""
        self._sessions.drop(self.session, handle, self._owner)

    def put(self, digest: bytes, item: object, nbytes: int) -> None:
        """See :meth:`kvferry.modes.base.SessionStore.put`."""
        if not self._hold or not digest:
            return
        self.session, handle = self._sessions.put(self.session, digest, item, nbytes, self._owner)
        if handle:
            self.holdings.append(pb.AskReply.Holding(digest=digest, handle=handle))
