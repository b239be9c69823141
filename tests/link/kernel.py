"""A transfer through the kernel's own shaper: ``unshare -rn python -m tests.link.kernel TRACE BYTES STEP``.

Runs in a network namespace of its own, whose loopback device a token bucket (``tbf``) slows down to what the trace
offers in each step; ``tc`` is told of every change in time. Prints the seconds from the first byte to the receiver's
word that it has the last one, and the bytes that the shaper let through: headers and acknowledgements are among them.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time

from kvferry.link import read_trace
from kvferry.link.trace import Trace

BURST = 600
"""Bytes: one packet with its header, for every change of the rate lets so many pass at once."""
LIMIT = 1_000_000
"""Bytes that may wait, more than a sender has under way: nothing is dropped."""
SEND_BUFFER = 64 * 1024
LEAST = 8
"""Bits per second that stand for none; ``tbf`` knows no 0."""


def bucket(verb: str, rate: float) -> str:
    return f"qdisc {verb} dev lo root tbf rate {max(int(rate), LEAST)}bit burst {BURST} limit {LIMIT}\n"


def rate_in(trace: Trace, step: float, number: int) -> float:
    """Bits per second in a step."""
    return 8 * float(trace.offered((number + 1) * step) - trace.offered(number * step)) / step


def replay(trace: Trace, step: float, began: float, over: threading.Event) -> None:
    """Change the bucket's rate when the trace does. The kernel looks at a new one when a packet comes, so one does."""
    with (
        subprocess.Popen(["tc", "-batch", "-"], stdin=subprocess.PIPE, text=True) as tc,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as kick,
    ):
        assert tc.stdin is not None
        nobody.bind(("127.0.0.1", 0))
        number, before = 1, rate_in(trace, step, 0)
        while not over.wait(max(began + number * step - time.monotonic(), 0)):
            if (rate := rate_in(trace, step, number)) != before:
                tc.stdin.write(bucket("change", rate))
                tc.stdin.flush()
                time.sleep(0.002)
                kick.sendto(b"", nobody.getsockname())
            number, before = number + 1, rate
        tc.stdin.close()


def receive(listener: socket.socket) -> None:
    """Count to the end, and say how many bytes came."""
    sock, _ = listener.accept()
    with sock:
        total = 0
        while data := sock.recv(1 << 16):
            total += len(data)
        sock.sendall(str(total).encode())


def main(name: str, nbytes: int, step: float) -> None:
    trace, over = read_trace(name), threading.Event()
    subprocess.run(["ip", "link", "set", "lo", "mtu", "576", "up"], check=True)
    subprocess.run(["tc", *bucket("add", rate_in(trace, step, 0)).split()], check=True)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sock:
        threading.Thread(target=receive, args=(listener,), daemon=True).start()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        began = time.monotonic()
        replaying = threading.Thread(target=replay, args=(trace, step, began, over))
        replaying.start()
        sock.connect(listener.getsockname())
        sock.sendall(bytes(nbytes))
        sock.shutdown(socket.SHUT_WR)
        assert int(sock.recv(100)) == nbytes
        seconds = time.monotonic() - began
        over.set()
        replaying.join()
    said = subprocess.run(["tc", "-s", "-j", "qdisc", "show", "dev", "lo"], check=True, capture_output=True).stdout
    (shaper,) = json.loads(said)
    print(json.dumps({"seconds": seconds, "wire_bytes": shaper["bytes"], "drops": shaper["drops"]}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
