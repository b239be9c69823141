"""Raw files of what SmolLM2 answered: JSON lines, the first says what was run, each other one is a question."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from kvferry.errors import InputError
from kvferry.evaluate.metrics.words import exact, normalise, word_f1
from kvferry.evaluate.records import Line, Outcome, Protocol, drop_half_line, json_lines
from kvferry.files import write_whole

FULL = "full|bf16"
BARE = "prompt"
"""The row without the text."""
FIXED = ("model", "prompt", "tokens", "rows", "questions")
"""In these a continued file must agree."""


class Answer(NamedTuple):
    """How one row did. ``bytes`` of its bitstream, None where none was written; ``kl`` and ``agree`` along the full
    cache's answer; what it ``said``, None where that is what the full cache said."""

    bytes: int | None
    kl: float
    agree: float
    said: str | None = None


@dataclass(frozen=True)
class Record:
    """One question under one protocol; ``said`` is the full cache's answer, ``text`` the number of what was read."""

    index: int
    protocol: Protocol
    text: int
    title: str
    references: tuple[str, ...]
    tokens: int
    length: int
    bf16_bytes: int
    said: str
    outcomes: dict[str, Answer] = field(default_factory=dict)

    def words(self, row: str) -> str:
        """What a row said."""
        said = self.outcomes[row].said
        return self.said if said is None else said

    @cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """F1, exact match and containment of every row."""
        return {row: scores_of(self.words(row), self.references) for row in self.outcomes}

    def line(self, score: str = "F1") -> Line:
        """As tables and claims read it."""
        outcomes = {row: Outcome(self.scores[row][score], x.bytes or 0, x.kl) for row, x in self.outcomes.items()}
        return Line(
            self.index, self.title, self.protocol, self.bf16_bytes, 0, self.tokens, outcomes, self.length,
            str(self.text),
        )  # fmt: skip


def scores_of(said: str, references: Sequence[str]) -> dict[str, float]:
    """F1 of words and exact match as SQuAD has them; containment: the words of a reference stand in the answer."""
    words = f" {normalise(said)} "
    held = any(f" {normalise(x)} " in words for x in references if normalise(x))
    return {
        "F1": max(word_f1(said, x) for x in references),
        "EM": exact(said, references),
        "contains": float(held),
    }


def begin(out: Path, plan: dict[str, Any], head: dict[str, Any]) -> set[int]:
    """Make a raw file, or see which texts it holds already.

    Raises
    ------
    InputError
        It holds the results of another plan or model.
    """
    if not out.exists() or not out.stat().st_size:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"squad": plan, **head}) + "\n")
        return set()
    before, records = read(out)
    was = before["squad"]
    if any(was[x] != plan[x] for x in FIXED) or before["fingerprint"] != head["fingerprint"]:
        raise InputError(f"{out} holds the results of another plan; choose another --out or remove it")
    if before.get("profiles") != head.get("profiles"):
        raise InputError(f"{out} holds the results of other profiles; choose another --out or remove it")
    drop_half_line(out)
    return {x.text for x in records}


def go_on(out: Path, head: dict[str, Any]) -> None:
    """Note in a raw file that holds questions already by what command those that follow are asked."""
    before, records = read(out)
    if records:
        run = {"first": len(records), "command": head["command"], "commit": head["commit"]}
        lines = out.read_text().splitlines(keepends=True)
        told = json.dumps(before | {"runs": [*before.get("runs", []), run]})
        write_whole(out, "".join([f"{told}\n", *lines[1:]]))


def made_by(head: dict[str, Any]) -> str:
    """By what commands a raw file was made, and from which question on."""
    first = f"`{head['command']}` at commit `{head['commit'][:12]}`"
    later = [
        f"from question {run['first'] + 1} on by `{run['command']}` at commit `{run['commit'][:12]}`"
        if run["commit"] else f"from question {run['first'] + 1} on by commands that were not recorded"
        for run in head.get("runs", [])
    ]  # fmt: skip
    return ", ".join([first, *later])


def append(out: Path, records: Iterable[Record]) -> None:
    """All of a text's questions at once."""
    lines = []
    for record in records:
        lines.append(json.dumps(asdict(record), separators=(",", ":"), ensure_ascii=False))
    with out.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Provenance and records by index.

    Raises
    ------
    InputError
        There is no such file, or it holds something else.
    """
    if not path.is_file():
        raise InputError(f"no results at {path}; `make results-smol` makes them")
    head, *lines = json_lines(path) or [{}]
    if "squad" not in head:
        raise InputError(f"{path} is not a raw file of `python -m study squad-sweep`")
    found = [
        Record(
            **{**x, "references": tuple(x["references"])}
            | {"outcomes": {row: Answer(*y) for row, y in x["outcomes"].items()}}
        )
        for x in lines
    ]
    return head, sorted(found, key=lambda x: x.index)
