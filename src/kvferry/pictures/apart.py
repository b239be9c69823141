"""``python -m kvferry.pictures.apart FD``: decodes picture files for another process, which may kill it at any time.

It is told of a job by one line of JSON on the socket ``FD``, with a file descriptor: that of memory which begins with
the picture file and has room for pixels behind it. It answers by one line. Before a job it sets itself limits of memory
and processor time, so that what a file does to a decoder stays here. It ends when the socket does.
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import ceil
from typing import Any

from PIL import Image

from kvferry.errors import InputError
from kvferry.pictures.header import WIRE_FORMATS
from kvferry.pictures.read import open_picture

Reduced = tuple[int, int, int]
"""Width and height that a picture is scaled to, and Pillow's number of the filter."""
Reduce = Callable[[int, int], Reduced | None]
"""What a picture of this width and height is scaled to by whoever reads it; None where that is not known."""
OpenPicture = Callable[[bytes, Reduce], Image.Image]
Sizes = Mapping[str, Reduced]
"""The same for the sizes that a file may come out at."""
LINE = 4096
"""Most bytes of a job, or of an answer."""
SLACK_BYTES = 64 * 1024 * 1024
"""What a process may take for itself beside a job."""
PATIENCE = 10


def as_is(width: int, height: int) -> None:
    """No picture is scaled."""


def open_wire_picture(file: bytes, reduce: Reduce = as_is) -> Image.Image:
    """A picture file that came over the wire, decoded in this process."""
    del reduce  # whoever reads it scales it
    return open_picture(file, formats=WIRE_FORMATS)


def opened(file: bytes, sizes: Sizes) -> Image.Image:
    """A picture file that came over the wire, in the size that it will be read in, where that is known."""
    picture = open_picture(file, formats=WIRE_FORMATS)
    reduced = sizes.get(name_of(picture.width, picture.height))
    if reduced is None:
        return picture
    width, height, how = reduced
    return picture.resize((width, height), Image.Resampling(how))


def name_of(width: int, height: int) -> str:
    """A size as :data:`Sizes` names it."""
    return f"{width}x{height}"


def main(descriptor: int) -> None:
    """Job after job."""
    if hasattr(os, "nice"):
        os.nice(PATIENCE)
    with socket.socket(fileno=descriptor) as line:
        while job := _job(line):
            began = time.process_time()
            said = _work(*job)
            line.sendall(json.dumps({**said, "seconds": time.process_time() - began}).encode() + b"\n")


def _job(line: socket.socket) -> tuple[dict[str, Any], int] | None:
    """The next one and its memory; None at the end."""
    data, handles, _, _ = socket.recv_fds(line, LINE, 1)
    while data and not data.endswith(b"\n"):
        data += line.recv(LINE)
    return (json.loads(data), handles[0]) if data else None


def _work(job: dict[str, Any], handle: int) -> dict[str, Any]:
    """Put the pixels behind the file; what there is to say of it."""
    try:
        with mmap.mmap(handle, 0) as memory:
            _limit(job["memory"], job["cpu"])
            picture = opened(memory[: job["file"]], job["sizes"])
            pixels = picture.tobytes()
            memory[job["file"] : job["file"] + len(pixels)] = pixels
            return {"width": picture.width, "height": picture.height}
    except InputError as error:
        return {"refused": str(error)}
    except MemoryError:
        return {"refused": f"the picture takes more than {job['memory']:,} bytes to decode; save it smaller"}
    finally:
        os.close(handle)


def _limit(memory: int, seconds: float) -> None:
    """So much more memory than now, and so much more of a processor; beyond that, the system ends the process."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        used = ceil(time.process_time() + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (used, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
