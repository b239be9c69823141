"""A process beside the cloud's that decodes large pictures, and that may die of it or be killed."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

import kvferry
from kvferry.cloud.costs import Account
from kvferry.errors import InputError
from kvferry.modes.files import decoding_bytes
from kvferry.pictures import WIRE_FORMATS, identify
from kvferry.pictures.apart import LINE, SLACK_BYTES, OpenPicture, Reduce, Reduced, name_of, open_wire_picture

APART_PIXELS = 1 << 21
"""Pictures of more pixels are decoded apart; a smaller one takes about 50 ms of a processor."""
SCANS = 8
"""A JPEG that is gone through more often counts as many times larger."""
LOOK_SECONDS = 0.05
"""How soon it is seen that nobody waits for a picture any more."""
IDLE_SECONDS = 60.0


class Workshop:
    """Decodes picture files, one after the other, large ones in a process of their own.

    That process is started when it is first needed, and again after it has died. It has what memory the picture was
    reckoned to take, and what its request has left of decoding time; it is killed when the request ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._used_at = 0.0

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        process = self._process
        return None if process is None or process.poll() is not None else process.pid

    def opener(self, account: Account) -> OpenPicture:
        """:meth:`open` for one request."""
        return partial(self.open, account)

    def open(self, account: Account, file: bytes, reduce: Reduce) -> Image.Image:
        """A picture file's pixels, of mode RGB; a large one in the size that ``reduce`` says it will be read in.

        Raises
        ------
        InputError
            It cannot be decoded, or not within its limits.
        CancelledError
            Nobody waits for it any more.
        """
        picture = identify(file, formats=WIRE_FORMATS)
        if not hasattr(socket, "send_fds") or _size(file, picture) <= APART_PIXELS:
            return open_wire_picture(file)
        while not self._lock.acquire(timeout=LOOK_SECONDS):
            account.reserve(0)
        try:
            self._used_at = time.monotonic()
            return self._open(account, file, picture, reduce)
        except BaseException:
            self._end()  # whatever it is at
            raise
        finally:
            self._lock.release()

    def rest(self) -> None:
        """End the process where it has had nothing to do for a while."""
        if self._process is not None and time.monotonic() - self._used_at > IDLE_SECONDS:
            self.close()

    def close(self) -> None:
        """End the process, when it is done with what it is at or at once where nobody waits for that."""
        if self._lock.acquire(timeout=2 * LOOK_SECONDS):
            try:
                self._end()
            finally:
                self._lock.release()

    def _open(self, account: Account, file: bytes, picture: Image.Image, reduce: Reduce) -> Image.Image:
        shapes = {(picture.width, picture.height), (picture.height, picture.width)}  # it may be turned upright
        sizes = {name_of(*shape): reduced for shape in shapes if (reduced := reduce(*shape)) is not None}
        room = 3 * max(_pixels(sizes.get(name_of(*shape)), *shape) for shape in shapes)
        job = {
            "file": len(file),
            "sizes": sizes,
            "cpu": account.seconds_left,
            "memory": 2 * (len(file) + room) + decoding_bytes(picture) + SLACK_BYTES,
        }
        handle = _memory()
        try:
            os.ftruncate(handle, len(file) + room)
            with mmap.mmap(handle, 0) as memory:
                memory[: len(file)] = file
                said = self._told(account, job, handle)
                width, height = said["width"], said["height"]
                if not 0 < 3 * width * height <= room:
                    raise InputError("the picture came out in another size than its header says; save it again")
                with memoryview(memory) as whole:
                    pixels = whole[len(file) : len(file) + 3 * width * height]
                    with pixels:
                        return Image.frombytes("RGB", (width, height), pixels)  # a copy
        finally:
            os.close(handle)

    def _told(self, account: Account, job: dict[str, Any], handle: int) -> dict[str, Any]:
        """What the process says of a job."""
        line = self._started()
        said = b""
        try:
            socket.send_fds(line, [json.dumps(job).encode() + b"\n"], [handle])
            while not said.endswith(b"\n"):
                account.reserve(0)
                with suppress(TimeoutError):
                    if not (more := line.recv(LINE)):
                        raise InputError(self._death(account))
                    said += more
        except (BrokenPipeError, ConnectionResetError):
            raise InputError(self._death(account)) from None
        answer: dict[str, Any] = json.loads(said)
        account.spend(answer["seconds"])
        if "refused" in answer:
            raise InputError(answer["refused"])
        return answer

    def _death(self, account: Account) -> str:
        """Why the process is gone."""
        assert self._process is not None
        code = self._process.wait()
        if code == -signal.SIGXCPU:
            account.spend(account.seconds_left)
            return f"what was sent takes more than {account.most_seconds:g} s to decode; send smaller pictures"
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return f"the process that decoded the picture ended {how}; save the picture again, smaller or as another format"

    def _started(self) -> socket.socket:
        """The line to the process, which is started if there is none."""
        if self._line is not None and self.pid is not None:
            return self._line
        self._end()
        ours, theirs = socket.socketpair()
        ours.settimeout(LOOK_SECONDS)
        here = str(Path(kvferry.__file__).parents[1])
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": path}
        with closing(theirs):
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "kvferry.pictures.apart", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=os.environ | quiet,
                start_new_session=True,  # an interrupt from a keyboard is the cloud's to handle
            )
        self._line = ours
        return ours

    def _end(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._line = self._process = None


def _size(file: bytes, picture: Image.Image) -> float:
    """Pixels that it costs to decode a file."""
    scans = file.count(b"\xff\xda") if picture.format == "JPEG" else 1
    return picture.width * picture.height * max(1.0, scans / SCANS)


def _pixels(reduced: Reduced | None, width: int, height: int) -> int:
    return width * height if reduced is None else reduced[0] * reduced[1]


def _memory() -> int:
    """A descriptor of memory that two processes can share and that has no name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("kvferry")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
