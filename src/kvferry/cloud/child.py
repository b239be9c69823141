"""A cloud as a second process, for whoever wants to cross a link on one machine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

from kvferry.errors import LinkError

START_SECONDS = 120


@contextlib.contextmanager
def cloud_process(model: str, device: str = "", dtype: str = "auto") -> Iterator[str]:
    """A real second process serving ``model`` on a free port; yields its address.

    Raises
    ------
    LinkError
        It does not start; why, it has said on stderr.
    """
    command = [sys.executable, "-m", "kvferry.cli", "serve", "--model", model, "--listen", "127.0.0.1:0", "--json"]
    command += ["--device", device, "--dtype", dtype]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        if not line.startswith("{"):
            raise LinkError(f"the cloud process did not start (exit code {process.wait(START_SECONDS)})")
        yield str(json.loads(line)["address"])
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
