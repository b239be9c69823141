"""What the commands share: progress bars for people, JSON for scripts. Results go to stdout, the rest to stderr."""

from __future__ import annotations

import json as jsonlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from kvferry.errors import InputError

Device = Annotated[str, typer.Option(help="Where the model lies, such as cuda or cuda:1; by default the CPU.")]
"""For commands that load a model; "" goes to :func:`kvferry.load` as None."""
Dtype = Annotated[str, typer.Option(help="auto (the checkpoint's own), float32, bfloat16 or float16.")]
"""For commands that load a model."""
Model = Annotated[str, typer.Argument(help="Shipped name, folder or Hub id.", show_default=False)]
"""MODEL, first in line; see :func:`model_of`."""
NamedModel = Annotated[str, typer.Option("--model", help="MODEL, by name.", show_default=False)]
"""The other way to say it."""
Traces = Annotated[
    str | None, typer.Option(help="Send OpenTelemetry spans to otlp (a collector) or console (stderr); extra 'otel'.")
]
"""For both ends."""


def model_of(first: str, named: str, default: str = "") -> str:
    """The model that a command was given, as its first word or after ``--model``.

    Raises
    ------
    InputError
        Two different ones, or none where there is no default.
    """
    if first and named and first != named:
        raise InputError(f"two models, {first} and --model {named}; name one")
    found = first or named or default
    if not found:
        raise InputError("name a model: a shipped name such as testbed/cloud, a folder, or a Hub id")
    return found


def print_json(record: dict[str, Any]) -> None:
    """One object on one line, at once."""
    print(jsonlib.dumps(record), flush=True)


def console(json: bool = False) -> Console:
    """A console on stderr that is silent for scripts."""
    return Console(stderr=True, quiet=json, highlight=False)


def typed(program: str = "kvferry") -> str:
    """The command as it was typed, for a record that others read: what stood there as an absolute path is named from
    the folder it was typed in, and by its last part where it lies elsewhere on this machine."""
    return f"{program} {shlex.join(_ABSOLUTE.sub(_from_here, word) for word in sys.argv[1:])}"


_ABSOLUTE = re.compile(r"(?<![^=@,])/[^|,=@]+")
"""Paths in a word of a command: all of it, or what follows an option's or a profile's sign."""


def _from_here(found: re.Match[str]) -> str:
    here, path = Path.cwd(), Path(os.path.normpath(found[0]))
    around = here.parent if here.parent.parent != here.parent else here
    return os.path.relpath(path, here) if path.is_relative_to(around) else path.name or found[0]


@contextmanager
def waiting(what: str, json: bool = False) -> Iterator[None]:
    """A spinner with a clock, on a terminal; Hugging Face's own bars and warnings would only fight with it."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console(json), transient=True, disable=_disabled(json)) as progress:
        progress.add_task(what, total=None)
        yield


class SendingBar:
    """How many bytes the cloud has acknowledged, on a terminal. It clears itself away before the answer."""

    def __init__(self, json: bool = False) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
        )
        self._progress = Progress(*columns, console=console(json), transient=True, disable=_disabled(json))
        self._task = self._progress.add_task("reading the pictures", total=None)

    def __enter__(self) -> SendingBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, acknowledged: int, total: int | None) -> None:
        """Move the bar; the callback for :meth:`kvferry.edge.Edge.ask`."""
        self._progress.update(self._task, description="sending", completed=acknowledged, total=total)
        if acknowledged == total:
            self._progress.stop()


def _disabled(json: bool) -> bool:
    return json or not sys.stderr.isatty()
