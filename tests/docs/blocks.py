"""The fenced blocks of README.md, CONTRIBUTING.md and docs/, and how to run those in Python."""

from __future__ import annotations

import inspect
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SAMPLES = ("text", "json", "toml", "yaml", "proto", "python-signature", "diff")
"""Languages of blocks that show something and are not run."""
PROGRAMS = ("kvferry", "make", "python", "pip", "git", "cd", "export", "source", "ssh")
"""A block without a language is of the shell where all its lines begin with one of these."""
_FENCE = re.compile(r"( *)(`{3,}|~{3,})\s*([\w-]*)")


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is that of its first line of text, counted from 1."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Lines of a shell block, continued ones joined, without comments and output."""
        joined = re.sub(r"\\\n\s*", "", self.text)
        lines = [line.strip() for line in joined.splitlines()]
        if self.language == "console":
            return [line[2:] for line in lines if line.startswith("$ ")]
        return [line for line in lines if line and not line.startswith("#")]


def blocks_of(page: Path) -> Iterator[Block]:
    """Every fenced block of a page, indented ones too; one without a language may turn out to be of the shell."""
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        fence = _FENCE.match(lines[at])
        at += 1
        if fence is None:
            continue
        start = at
        while at < len(lines) and lines[at].strip() != fence[2]:
            at += 1
        text = textwrap.dedent("\n".join(lines[start:at]))
        at += 1
        block = Block(page, start + 1, fence[3], text)
        if not block.language and all(line.split()[0] in PROGRAMS for line in block.commands):
            block = Block(page, start + 1, "sh", text)
        yield block


def words_of(command: str) -> list[str]:
    """A command line as the shell would split it, without its comment."""
    return shlex.split(command, comments=True)


def module_of(page: Path) -> ModuleType:
    """Where a page's Python blocks live together; dataclasses look their own module up, so it must be known."""
    module = ModuleType("page_" + re.sub(r"\W", "_", str(page.relative_to(ROOT))))
    sys.modules[module.__name__] = module
    return module


def run_python(block: Block, module: ModuleType, addresses: Mapping[str, str] | None = None) -> None:
    """Run one block; tracebacks name the page and its line. Tests that it defines are called.

    Of ``addresses``, those that a page writes stand before those that its servers really listen on.
    """
    before = dict(vars(module))
    source = "\n" * (block.line - 1) + block.text
    for written, real in (addresses or {}).items():
        source = source.replace(written, real)
    exec(compile(source, str(block.page), "exec"), vars(module))
    for name, value in list(vars(module).items()):
        if name.startswith("test_") and inspect.isfunction(value) and before.get(name) is not value:
            value()
