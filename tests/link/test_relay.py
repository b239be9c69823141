"""The relay on real sockets."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kvferry.errors import InputError
from kvferry.link import ShapedLink, parse_address


@contextmanager
def server(handle) -> Iterator[str]:
    """Serve every connection with ``handle(sock)`` in a thread; gives the address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=handle, args=(sock,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def drain(sock: socket.socket) -> int:
    total = 0
    while data := sock.recv(1 << 16):
        total += len(data)
    return total


def count_then_tell(sock: socket.socket) -> None:
    """Read to the end, then answer with the number of bytes."""
    with sock:
        sock.sendall(str(drain(sock)).encode())


def echo(sock: socket.socket) -> None:
    with sock:
        while data := sock.recv(1 << 16):
            sock.sendall(data)


def ended(sock: socket.socket) -> bool:
    """Whether the other side has gone (a time-out is an error)."""
    try:
        return sock.recv(1) == b""
    except ConnectionError:
        return True


def seconds_to_upload(nbytes: int, link: ShapedLink) -> float:
    with socket.create_connection(parse_address(link.address)) as sock:
        start = time.monotonic()
        sock.sendall(bytes(nbytes))
        sock.shutdown(socket.SHUT_WR)
        assert int(sock.recv(100)) == nbytes
        return time.monotonic() - start


class Hiccups:
    """How much longer than asked this machine made a thread sleep, all in all, in seconds."""

    def __init__(self) -> None:
        self.total = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.is_set():
            asleep = time.monotonic()
            time.sleep(0.005)
            late = time.monotonic() - asleep - 0.005
            self.total += late if late > 0.002 else 0.0

    def __enter__(self) -> "Hiccups":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize(("rate", "nbytes"), [("10mbit", 1_250_000), ("100mbit", 12_500_000), ("500kbit", 62_500)])
def test_one_second_of_uplink(rate: str, nbytes: int) -> None:
    """Within 2 % in the best of three. Never faster; slower only by what a busy machine takes for itself."""
    excess = []
    with server(count_then_tell) as address:
        while len(excess) < 3 and min(excess, default=1.0) > 0.02:
            with Hiccups() as hiccups, ShapedLink(address, uplink=rate) as link:
                taken = seconds_to_upload(nbytes, link)
                assert link.uplink_bytes == nbytes
                assert link.downlink_bytes == len(str(nbytes))
            assert taken >= 0.98
            excess.append(taken - 1.0 - hiccups.total)
    assert min(excess) <= 0.02


def test_downlink_and_delay_are_their_own() -> None:
    with (
        server(echo) as address,
        ShapedLink(address, downlink="2mbit", delay_ms=50) as link,
        socket.create_connection(parse_address(link.address)) as sock,
    ):
        start = time.monotonic()
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        assert 0.1 <= time.monotonic() - start < 2

        start = time.monotonic()
        threading.Thread(target=sock.sendall, args=(bytes(125_000),), daemon=True).start()
        got = 0
        while got < 125_000:
            got += len(sock.recv(1 << 16))
        assert 0.59 <= time.monotonic() - start < 5


def test_backpressure_reaches_the_sender() -> None:
    with (
        server(drain) as address,
        ShapedLink(address, uplink="500kbit") as link,
        socket.create_connection(parse_address(link.address)) as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
        sock.settimeout(0.5)
        with pytest.raises(TimeoutError):
            sock.sendall(bytes(2_000_000))
        assert link.uplink_bytes < 60_000


def test_the_target_dies() -> None:
    def die(sock: socket.socket) -> None:
        sock.recv(10)
        sock.close()

    with (
        server(die) as address,
        ShapedLink(address, uplink="1mbit") as link,
        socket.create_connection(parse_address(link.address), timeout=5) as sock,
    ):
        sock.sendall(bytes(20_000))
        assert ended(sock)


def test_nobody_at_the_target() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with (
        ShapedLink(f"127.0.0.1:{port}") as link,
        socket.create_connection(parse_address(link.address), timeout=5) as sock,
    ):
        assert ended(sock)


def test_close_cuts_connections_and_leaves_no_thread() -> None:
    with server(echo) as address:
        link = ShapedLink(address, uplink="10mbit")
        sock = socket.create_connection(parse_address(link.address), timeout=5)
        sock.sendall(b"x")
        assert sock.recv(1) == b"x"
        link.close()
        link.close()
        assert sock.recv(1) == b""
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(parse_address(link.address), timeout=5)
        sock.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "kvferry-link"]


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="host:port"):
        ShapedLink("nowhere")
    with pytest.raises(InputError, match="rate"):
        ShapedLink("127.0.0.1:1", uplink="quick")
    with pytest.raises(InputError, match="delay"):
        ShapedLink("127.0.0.1:1", delay_ms=-1)
