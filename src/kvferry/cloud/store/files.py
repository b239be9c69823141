"""A store in a folder of this machine: a folder for every session, a file for every blob, each whole or not there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections import OrderedDict
from pathlib import Path

from kvferry.errors import InputError
from kvferry.files import write_whole

COUNT = "next"
"""The file with the next number of a session; when it was last touched is when the session was last used."""
SUFFIX = ".kv"
_SESSION = re.compile(r"[0-9a-f]{64}")


class Files:
    """See :class:`kvferry.cloud.store.base.Store`. One process at a time has it, held by a lock.

    Parameters
    ----------
    seconds : float
        A session that is unused for so long is forgotten, by the clock of this machine.
    max_bytes : int
        Of all files; the session unused for longest goes first.

    Raises
    ------
    InputError
        The folder cannot be made or written in, or another process has it.
    """

    def __init__(self, folder: Path, seconds: float, max_bytes: int) -> None:
        from filelock import FileLock, Timeout

        self._folder, self._seconds, self._max_bytes = folder, seconds, max_bytes
        self._lock = threading.RLock()
        self._sessions: OrderedDict[str, int] = OrderedDict()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._held = FileLock(folder / "lock")
            self._held.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another cloud keeps its sessions in {folder}; name another folder") from None
        except OSError as error:
            raise InputError(f"cannot keep sessions in {folder} ({error.strerror}); name another folder") from None
        found = [(self._used_at(path.name), path.name) for path in folder.iterdir() if _SESSION.fullmatch(path.name)]
        for _, session in sorted(found):
            self._sessions[session] = sum(x.stat().st_size for x in (folder / session).glob(f"*{SUFFIX}"))
        self._tidy()

    @property
    def nbytes(self) -> int:
        """Of all files."""
        return sum(self._sessions.values())

    def reserve(self, session: str, count: int) -> int:
        """See :class:`~kvferry.cloud.store.base.Store`."""
        with self._lock:
            self._tidy()
            place = self._folder / session
            path = place / COUNT
            first = _number(path) if path.exists() else 1
            place.mkdir(mode=0o700, exist_ok=True)
            try:
                write_whole(path, str(first + count), secret=True)
            except OSError:
                if session not in self._sessions:
                    shutil.rmtree(place, ignore_errors=True)
                raise
            self._sessions.setdefault(session, 0)
            self._sessions.move_to_end(session)
            return first

    def get(self, session: str, number: int) -> bytes | None:
        """See :class:`~kvferry.cloud.store.base.Store`."""
        with self._lock:
            self._tidy()
            if session not in self._sessions:
                return None
            try:
                blob = self._path(session, number).read_bytes()
            except FileNotFoundError:
                return None
            self._touch(session)
            return blob

    def put(self, session: str, number: int, blob: bytes) -> None:
        """See :class:`~kvferry.cloud.store.base.Store`."""
        with self._lock:
            self._tidy()
            if session not in self._sessions or len(blob) > self._max_bytes:
                return
            self._sessions.move_to_end(session)
            self.drop(session, number)
            while self.nbytes + len(blob) > self._max_bytes:
                oldest = next(iter(self._sessions))
                if oldest == session:
                    return
                self._forget(oldest)
            write_whole(self._path(session, number), blob, secret=True)
            self._sessions[session] += len(blob)
            self._touch(session)

    def drop(self, session: str, number: int) -> None:
        """See :class:`~kvferry.cloud.store.base.Store`."""
        with self._lock:
            path = self._path(session, number)
            with contextlib.suppress(FileNotFoundError):
                size = path.stat().st_size
                path.unlink()
                self._sessions[session] -= size

    def close(self) -> None:
        """See :class:`~kvferry.cloud.store.base.Store`."""
        self._held.release()

    def _path(self, session: str, number: int) -> Path:
        return self._folder / session / f"{number}{SUFFIX}"

    def _touch(self, session: str) -> None:
        self._sessions.move_to_end(session)
        with contextlib.suppress(FileNotFoundError):
            os.utime(self._folder / session / COUNT)

    def _used_at(self, session: str) -> float:
        try:
            return (self._folder / session / COUNT).stat().st_mtime
        except FileNotFoundError:  # it died before it was one
            return 0.0

    def _tidy(self) -> None:
        """Forget what has been unused for too long."""
        oldest = time.time() - self._seconds
        while self._sessions and self._used_at(next(iter(self._sessions))) < oldest:
            self._forget(next(iter(self._sessions)))

    def _forget(self, session: str) -> None:
        """The count goes last: where this is cut short, what is left is a session without blobs."""
        place = self._folder / session
        for path in place.glob(f"*{SUFFIX}"):
            path.unlink(missing_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        self._sessions.pop(session)


def _number(path: Path) -> int:
    text = path.read_text("latin-1")
    if not re.fullmatch("[0-9]{1,18}", text):
        raise OSError(f"{path} holds no number")
    return int(text)
