"""``kvferry coordinate`` and agents, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.crossing.process import COMMAND, ENVIRONMENT

ROOT = Path(__file__).parents[2]


class Process:
    """A child that is killed in the end."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT)

    def line(self) -> object:
        """The next line that it prints, from JSON."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class CoordinatorProcess(Process):
    """Shares out an uplink; listens when entered."""

    def __init__(self, uplink: str, listen: str = "127.0.0.1:0", *options: str) -> None:
        super().__init__([*COMMAND, "coordinate", "--uplink", uplink, "--listen", listen, "--json", *options])

    def __enter__(self) -> CoordinatorProcess:
        self.address: str = self.line()["address"]  # type: ignore[index]
        return self


class AgentProcess(Process):
    """A member that does nothing but be there."""

    def __init__(self, coordinator: str) -> None:
        super().__init__([sys.executable, "-m", "tests.coordinator.agent", coordinator])

    def __enter__(self) -> AgentProcess:
        return self


def within(seconds: float, true: Callable[[], object]) -> float:
    """Wait until something is so; how long that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it did not come to pass"
        time.sleep(0.01)
    return time.monotonic() - began
