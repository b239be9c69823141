"""The bytes of one question by their offsets: what the cloud has not acknowledged can be had again."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator


class Supply:
    """Makes each byte once, whichever call asks for it.

    Parameters
    ----------
    chunks : iterator of bytes
    made : callable
        Is told of every new piece, in order.
    """

    def __init__(self, chunks: Iterator[bytes], made: Callable[[bytes], None]) -> None:
        self._chunks, self._on_made = chunks, made
        self._making, self._looking = threading.Lock(), threading.Lock()
        self._kept: deque[tuple[int, bytes]] = deque()
        self._made = 0
        self._failure: BaseException | None = None

    def read(self, offset: int) -> bytes:
        """A piece that begins there, made now if it is not there yet; empty at the end.

        Raises what making it raises, every time.
        """
        if (found := self._found(offset)) is not None:
            return found
        with self._making:
            if (found := self._found(offset)) is not None:  # another call has asked for it meanwhile
                return found
            if self._failure is not None:
                raise self._failure
            try:
                data = next((chunk for chunk in self._chunks if chunk), b"")
            except BaseException as error:
                self._failure = error
                raise
            if data:
                self._on_made(data)
                with self._looking:
                    self._kept.append((self._made, data))
                    self._made += len(data)
            return data

    def acknowledged(self, total: int) -> None:
        """The cloud has the first so many bytes, and they will not be asked for again."""
        with self._looking:
            while self._kept and self._kept[0][0] + len(self._kept[0][1]) <= total:
                self._kept.popleft()

    def _found(self, offset: int) -> bytes | None:
        with self._looking:
            if offset >= self._made:
                return None
            for begin, data in self._kept:
                if begin <= offset < begin + len(data):
                    return data[offset - begin :]
        raise ValueError(f"byte {offset} was acknowledged and is gone")
