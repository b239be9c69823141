"""``kvferry serve --ray``: replicas that Ray runs may be killed and replaced under load, and no question is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from kvferry import Edge
from tests.crossing.process import CloudProcess

QUESTION = "what colour is the circle?"


class Load:
    """Edges that ask one question after the other until they are told to stop."""

    def __init__(self, address: str, picture: Path, edges: int = 2) -> None:
        self.texts: list[str] = []
        self.failed: list[str] = []
        self._address, self._picture, self._stop = address, picture, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(edges)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _ask(self) -> None:
        with Edge(None, self._address, deadline=100) as edge:
            while not self._stop.is_set():
                try:
                    said = edge.ask([self._picture], QUESTION, mode="image", max_new_tokens=16)
                    self.texts.append(said.text)
                    time.sleep(0.1)  # new processes need the machine too
                except Exception as error:
                    self.failed.append(repr(error))


def until(log: Path, words: str, count: int = 1) -> None:
    end = time.monotonic() + 400
    while log.read_text().count(words) < count:
        assert time.monotonic() < end, f"{words!r} does not come: {log.read_text()[-2000:]}"
        time.sleep(0.2)


@pytest.mark.timeout(900)
def test_replicas_are_killed_and_replaced_under_load(model_folder: Path, picture: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is in the extra 'ray'")
    log = tmp_path / "gateway.log"
    with CloudProcess(model_folder, "--ray", "local", "--replicas", "2", log=log) as gateway:
        first, second = gateway.ready["replicas"]  # type: ignore[misc]
        with Load(gateway.address, picture) as load:
            until_asked = time.monotonic() + 60
            while len(load.texts) < 6 and time.monotonic() < until_asked:
                time.sleep(0.05)
            os.kill(first, signal.SIGKILL)
            until(log, "is back, as process")
            gateway.process.send_signal(signal.SIGUSR1)
            until(log, "has taken the place of", 2)
            before = len(load.texts)
            while len(load.texts) < before + 6 and not load.failed and time.monotonic() < until_asked + 300:
                time.sleep(0.05)
        assert load.failed == []
        assert len(set(load.texts)) == 1
        assert not _alive(second)
        assert gateway.stop() == 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
