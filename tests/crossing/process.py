"""A small model folder and real server processes on it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Self

import torch
from PIL import Image

from kvferry.testbed.build import Size, build_model, write_folder

ENVIRONMENT = os.environ | {"GRPC_VERBOSITY": "NONE"}
COMMAND = [sys.executable, "-m", "kvferry.cli"]


def write_model(folder: Path, seed: int = 0, gain: float = 1.0) -> Path:
    """An untrained model that never ends an answer by itself, so that tests can tell how long one takes.

    It says nearly the same whatever it reads; with a ``gain`` on its matrices the answer hangs on every word.
    """
    size = Size(
        layers=2, hidden=64, heads=2, kv_heads=2, intermediate=128, tower_depth=1, tower_width=64, tower_heads=2
    )
    model = build_model(size, seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name and "lm_head" not in name:
                weight.mul_(gain)
    write_folder(model, folder)
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_text())
    del settings["eos_token_id"]
    generation.write_text(json.dumps(settings))
    return folder


def write_picture(path: Path) -> Path:
    """A picture of 224 x 224 pixels: 196 visual tokens."""
    Image.radial_gradient("L").resize((224, 224)).convert("RGB").save(path)
    return path


class ListeningProcess:
    """A command that listens, in a process of its own; it starts at once, its address is waited for."""

    def __init__(self, command: str, *options: str, log: Path | None = None) -> None:
        words = [*COMMAND, command, "--listen", "127.0.0.1:0", "--json", *options]
        with contextlib.nullcontext() if log is None else log.open("wb") as stderr:
            self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=stderr, text=True, env=ENVIRONMENT)
        self._ready: dict[str, object] | None = None

    @property
    def ready(self) -> dict[str, object]:
        """The line that the server prints when it listens."""
        if self._ready is None:
            assert self.process.stdout is not None
            self._ready = json.loads(self.process.stdout.readline())
        return self._ready

    @property
    def address(self) -> str:
        return str(self.ready["address"])

    def stop(self) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


class CloudProcess(ListeningProcess):
    """``kvferry serve``."""

    def __init__(self, model: Path, *options: str, log: Path | None = None) -> None:
        super().__init__("serve", "--model", str(model), *options, log=log)
