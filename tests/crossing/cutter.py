"""A relay whose connections can be cut, or made to hang, while they are used."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

from kvferry.link import parse_address

PIECE = 4096


class Cutter:
    """Carries connections on ``address`` to ``target`` until told otherwise.

    Attributes
    ----------
    up_bytes : int
        Carried to the target, all connections together.
    connections : int
        So many were made.
    """

    def __init__(self, target: str) -> None:
        self._target = parse_address(target)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.up_bytes = self.connections = 0
        self._open: list[socket.socket] = []
        self._flowing = threading.Event()
        self._flowing.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End every connection there is; new ones are carried."""
        ended, self._open = self._open, []
        for each in ended:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def hang(self) -> None:
        """Those that there are carry nothing from now on, and say nothing of it; new ones are carried."""
        self._flowing.clear()
        self._flowing = threading.Event()
        self._flowing.set()

    def __enter__(self) -> Cutter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                self.connections += 1
                self._open += [near, far]
                for source, sink, up in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._carry, args=(source, sink, up, self._flowing), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, up: bool, flowing: threading.Event) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                if not flowing.is_set():
                    threading.Event().wait(60)
                    return
                if up:
                    self.up_bytes += len(data)
                sink.sendall(data)
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
