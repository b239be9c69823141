"""Between sessions and a store: what goes in is written behind the caller's back, what comes out is checked."""

from __future__ import annotations

import hashlib
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

from kvferry.cloud.store.base import Store
from kvferry.cloud.store.items import Entry, pack, unpack
from kvferry.cloud.store.seal import Seal
from kvferry.errors import CorruptError

log = logging.getLogger(__name__)
BLOCK = 1 << 16
"""Numbers that a process reserves at once for a session; when they are used up it holds no more for that session."""
MAX_WAITING_BYTES = 256 * 1024 * 1024
"""Of what waits to be written; what comes on top is not stored."""


class Backing:
    """A store for the sessions of one model. Nothing that goes wrong in the store reaches a request: it is not held,
    and the log says so.

    Parameters
    ----------
    fingerprint : str
        Of the model; what was held for another one is not found, and refused if it is.
    """

    def __init__(self, store: Store, seal: Seal, fingerprint: str) -> None:
        self._store, self._seal, self._fingerprint = store, seal, fingerprint
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kvferry-store")
        self._lock = threading.Lock()
        self._waiting = 0

    def reserve(self, session: bytes) -> int:
        """The first of :data:`BLOCK` handles that this session has never given out; 0 where that cannot be known."""
        try:
            return self._store.reserve(self._name(session), BLOCK)
        except OSError as error:
            _tell("a session is not stored", error)
            return 0

    def load(self, session: bytes, handle: int, owner: str) -> Entry | None:
        """What ``owner`` was held under a handle; None for whatever is not there, not whole, or not theirs."""
        name = self._name(session)
        try:
            blob = self._store.get(name, handle)
            if blob is None:
                return None
            entry = unpack(self._seal.open(blob, _context(name, handle)))
        except OSError as error:
            _tell("what is stored cannot be read", error)
            return None
        except CorruptError as error:
            _tell("what is stored is not held", error)
            self.drop(session, handle)
            return None
        return entry if entry.owner == owner and entry.fingerprint == self._fingerprint else None

    def save(self, session: bytes, handle: int, item: object, digest: bytes, nbytes: int, owner: str) -> None:
        """Store it as soon as that can be done."""
        with self._lock:
            if self._waiting + nbytes > MAX_WAITING_BYTES:
                log.warning("what is held is not stored: too much waits to be written")
                return
            self._waiting += nbytes
        entry = Entry(item, digest, nbytes, owner, self._fingerprint)
        self._writer.submit(self._write, self._name(session), handle, entry)

    def drop(self, session: bytes, handle: int) -> None:
        """Forget it as soon as that can be done."""
        self._writer.submit(self._remove, self._name(session), handle)

    def close(self) -> None:
        """Write what waits, and let the store go."""
        self._writer.shutdown()
        self._store.close()

    def _write(self, name: str, handle: int, entry: Entry) -> None:
        try:
            data = pack(entry)
            if data is not None:
                self._store.put(name, handle, self._seal.close(data, _context(name, handle)))
        except OSError as error:
            _tell("what is held is not stored", error)
        except Exception:
            log.exception("what is held is not stored")
        finally:
            with self._lock:
                self._waiting -= entry.nbytes

    def _remove(self, name: str, handle: int) -> None:
        try:
            self._store.drop(name, handle)
        except OSError as error:
            _tell("what is stored cannot be removed", error)

    def _name(self, session: bytes) -> str:
        """Whoever reads the store learns no session's id."""
        return hashlib.sha256(b"kvferry session\0" + self._fingerprint.encode() + b"\0" + session).hexdigest()


def _context(name: str, handle: int) -> bytes:
    return f"{name}:{handle}".encode()


def _tell(what: str, error: Exception) -> None:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    log.warning("%s: %s", what, why)
