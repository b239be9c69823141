"""Command lines of the documents: run where that is cheap, parsed and checked by the real command line where not."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from kvferry.cli import main
from kvferry.cli.app import app
from kvferry.codecs import parse_codec
from kvferry.evaluate.sweep import grid
from kvferry.link import Rate
from kvferry.modes import parse_mode
from kvferry.policy import Way
from kvferry.recipe import Recipe
from tests.crossing.process import ListeningProcess
from tests.docs.blocks import ROOT, Block, words_of

QUESTIONS = 8
"""A command that asks more questions than this (``--n``) is checked only: it takes minutes."""
CHECKED_ONLY = {
    "edge": "asks until its input ends; tests/cli/test_edge.py runs it",
    "demo": "starts two processes and asks 20 questions in ten ways; tests/cli/test_demo.py runs it",
    "tune": "searches for minutes; tests/fit/test_tune.py runs a small search",
    "serve --ray": "needs the extra 'ray'; tests/cloud/test_ray.py runs it where that is installed",
    "ask --answer-by": "its answer depends on how fast this machine is; tests/crossing/test_progressive.py runs it",
    "ask --deadline": "may be late on a busy machine; tests/crossing/test_faults.py runs deadlines",
}
"""Why a line is not run: by its command, or by its command and an option that it has."""
ADDED = {
    "link": (["--seconds", "0.1"], "it would relay until interrupted"),
    "sweep": (["--processes", "1"], "processes of their own would import everything again"),
    "simulate": (["--requests", "500"], "20,000 questions a policy take a minute"),
}
"""What is added to a line that is run, and why."""
FOREIGN = {
    "cd": "moves about in the reader's checkout",
    "export": "sets the reader's environment",
    "git": "would change a repository",
    "lmms-eval": "a harness of its own, in an extra; tests/integrations runs the plug-in where it is installed",
    "source": "activates the reader's environment",
    "ssh": "needs a second machine",
    "grpcurl": "a tool of its own, not among the dependencies",
    "grpc_health_probe": "a tool of its own, not among the dependencies",
}
"""Programs that are not run, and why."""
LISTENING = ("serve", "coordinate", "studio")
"""Commands that run as processes of their own until the tests end."""
CLOUD = "127.0.0.1:7421"
"""Where ``kvferry ask`` looks for a cloud unless it is told."""
_HUB_ID = re.compile(r"(?!testbed/)[\w.-]+/[\w.-]+")
_MODELS = ("model", "named", "against", "edge")
_TYPER = typer.main.get_command(app)


class Servers:
    """Real processes of commands that listen, one for every set of options, on ports that are free."""

    def __init__(self) -> None:
        self._running: dict[tuple[str, ...], ListeningProcess] = {}

    def start(self, *words: str) -> ListeningProcess:
        """A server that is listening, or will be: its command and options."""
        if words not in self._running:
            self._running[words] = ListeningProcess(*words)
        return self._running[words]

    def stop(self) -> None:
        """End them as an operator would, all at once; they must have answered to the end."""
        for server in self._running.values():
            assert server.ready
            server.process.terminate()
        for server in self._running.values():
            with server:
                assert server.process.wait(120) == 0


class Shell:
    """Runs the command lines of one page."""

    def __init__(self, servers: Servers, monkeypatch: pytest.MonkeyPatch, output: Callable[[], Any]) -> None:
        self._servers = servers
        self._monkeypatch = monkeypatch
        self._output = output
        self._listening: dict[str, ListeningProcess] = {}
        self._doors: dict[str, ListeningProcess] = {}

    @property
    def addresses(self) -> dict[str, str]:
        """Where the servers that the page has started really listen, by the addresses it gave them."""
        doors = {written: str(process.ready["http"]) for written, process in self._doors.items()}
        return {written: process.address for written, process in self._listening.items()} | doors

    def run(self, block: Block) -> None:
        """All lines of a block; those of a ``console`` block, which shows a run of its own, are only checked."""
        for command in block.commands:
            words = words_of(command)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                name, _, value = words.pop(0).partition("=")
                self._monkeypatch.setenv(name, value)
            words = [word for word in words if word != "&"]
            program = {"make": _check_make, "python": _check_python, "pip": _check_pip}.get(words[0])
            try:
                if words[0] == "kvferry":
                    self._kvferry(words[1:], run=block.language != "console")
                elif program is not None:
                    program(words[1:])
                elif words[0] not in FOREIGN:
                    raise AssertionError(f"nobody has said how to test {words[0]}; see tests/docs/shell.py")
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{block.place}: {command!r}: {error}") from error

    def _kvferry(self, words: list[str], run: bool) -> None:
        if not words or words[0].startswith("-"):
            self._call(words)
            return
        name, arguments = words[0], words[1:]
        command = _TYPER.get_command(None, name)  # type: ignore[attr-defined,arg-type]
        if command is None:
            raise AssertionError(f"there is no command {name}")
        before = []
        if hasattr(command, "commands"):  # fit KIND
            before, name, arguments = [name], arguments[0], arguments[1:]
            command = command.commands[name]
        params = command.make_context(name, list(arguments)).params
        if not run or why_not_run(name, arguments, params):
            check_values(name, params)
        elif name in LISTENING:
            options = _without(arguments, "--listen", "--json")
            door = options[options.index("--http") + 1] if "--http" in options else ""
            options = ["127.0.0.1:0" if door and word == door else word for word in options]
            self._listening[params["listen"]] = self._servers.start(name, *options)
            if door:
                self._doors[door] = self._listening[params["listen"]]
        else:
            extra = [] if name not in ADDED or ADDED[name][0][0] in arguments else ADDED[name][0]
            self._call([*before, name, *self._addressed(name, arguments), *extra])

    def _call(self, words: list[str]) -> None:
        self._monkeypatch.setattr(sys, "argv", ["kvferry", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = self._output()
        if ended.value.code:
            raise AssertionError(f"ended with {ended.value.code}: {said.err or said.out}")

    def _addressed(self, name: str, arguments: list[str]) -> list[str]:
        """The line with the addresses that servers of the page really listen on, and a usual cloud if it has none."""
        arguments = [self.addresses.get(word, word) for word in arguments]
        if name == "link" and arguments[0] not in self.addresses.values():
            return [self._usual_cloud(), *arguments[1:]]
        if name == "ask" and "--cloud" not in arguments:
            return [*arguments, "--cloud", self.addresses.get(CLOUD) or self._usual_cloud()]
        return arguments

    def _usual_cloud(self) -> str:
        return self._servers.start("serve", "--model", "testbed/cloud").address


def why_not_run(name: str, arguments: list[str], params: dict[str, Any]) -> str | None:
    """Why a command line is only checked; None where it is run."""
    for key, reason in CHECKED_ONLY.items():
        command, *options = key.split()
        if command == name and all(option in arguments for option in options):
            return reason
    if "n" in params and (params["n"] is None or params["n"] > QUESTIONS):
        return f"asks more than {QUESTIONS} questions"
    elsewhere = [params[key] for key in _MODELS if _HUB_ID.fullmatch(str(params.get(key) or ""))]
    return f"{elsewhere[0]} would have to be downloaded" if elsewhere else None


def check_values(name: str, params: dict[str, Any]) -> None:
    """What the command would find wrong with values that are texts to its parser. Files need not be there."""
    for recipe in _all(params.get("recipe")):
        if not re.match(r"\w+@.*\.json$", recipe):  # a preset of a file is that file's
            Recipe.parse(recipe)
    for mode in _all(params.get("mode")):
        if mode != "auto":
            parse_mode(mode, "balanced")
    for policy in _all(params.get("policy")):
        Way.parse(policy)
    for link in (params.get("uplink"), params.get("downlink")):
        if link and not link.startswith("trace:"):
            Rate.parse(link)
    if name == "sweep":
        columns = {
            key: params[key].split(",") for key in ("selections", "fractions", "codecs", "budgets", "modalities")
        }
        fractions = [float(x) for x in columns.pop("fractions")]
        for recipe in grid(**columns, fractions=fractions, lossless=params["lossless"]):
            Recipe.parse(recipe)
        for codec in filter(None, params["embeds"].split(",")):
            parse_codec(codec)


def _all(value: Any) -> list[str]:
    return [str(x) for x in (value if isinstance(value, list | tuple) else [value]) if x]


def _without(arguments: list[str], *names: str) -> list[str]:
    """Arguments without these options and, but for ``--json``, their values."""
    kept, words = [], iter(arguments)
    for word in words:
        if word not in names:
            kept.append(word)
        elif word != "--json":
            next(words)
    return kept


def _check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    unknown = [word for word in words if "=" not in word and word not in targets]
    assert not unknown, f"the Makefile has no target {unknown}"


def _check_python(words: list[str]) -> None:
    """Scripts, and paths given to pytest, are there; modules can be found."""
    if words[0] == "-m" and words[1] == "pytest":
        paths = [word.split("::")[0] for word in words[2:] if "/" in word]
    else:
        paths = [word for word in words[:1] if word.endswith(".py")]
    missing = [path for path in paths if not (ROOT / path).exists() and not Path(path).exists()]
    assert not missing, f"there is no {missing}"


def _check_pip(words: list[str]) -> None:
    """Extras that are installed exist."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = [extra for word in words for found in re.findall(r"\[(.*)\]", word) for extra in found.split(",")]
    assert set(wanted) <= set(known), f"there are no extras {set(wanted) - set(known)}"
