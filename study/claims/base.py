"""What a claim is, what was found about it, and how findings are read from stored raw results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kvferry.errors import InputError
from kvferry.evaluate import records
from kvferry.evaluate.measured import Measured
from kvferry.evaluate.records import Line, Protocol
from kvferry.statistics import Estimate
from study.methods import Methods

HOLDS, FAILS, UNTESTABLE, UNMEASURED = "holds", "fails", "not testable here", "not measured"
PART = "holds in part"
MODELS = ("cloud", "edge", "control")
"""Shipped models, as raw files are named after them."""


class MissingError(InputError):
    """A raw file, or a row of one, is not there."""


@dataclass(frozen=True)
class Claim:
    """What a source says.

    Parameters
    ----------
    number : int
    text, figure, source : str
        In a few words, the published number, and where it was published.
    make : str
        What makes the raw results here.
    elsewhere : str
        The same question put to a checkpoint of the sources' size.
    """

    number: int
    text: str
    figure: str
    source: str
    make: str
    elsewhere: str = ""


@dataclass(frozen=True)
class Finding:
    """What raw results say about a claim.

    Parameters
    ----------
    measured : str
        Figures with intervals, models and ``n``.
    verdict : str
        :data:`HOLDS`, :data:`FAILS`, :data:`UNTESTABLE`, or :data:`PART` and which part.
    why : str
        One sentence.
    rule : str
        When the claim counts as holding.
    more : tuple of str
        What stands behind it.
    """

    measured: str
    verdict: str
    why: str
    rule: str
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A claim with its finding and the commands that made the raw results, each with its file and commit.

    ``real`` is what was found on weights that others trained; None where that model cannot be asked.
    """

    claim: Claim
    finding: Finding
    commands: tuple[tuple[str, str, str], ...]
    real: Finding | None = None


class Raw:
    """Stored raw results; remembers which files were asked for, so that a verdict can name them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.heads: dict[str, dict[str, Any]] = {}
        self._json = cache(self._read_json)
        self._lines = cache(self._read_lines)
        self._measured = cache(self._measure)
        self._methods = cache(self._group)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / name).is_file()

    def models(self, pattern: str, among: Iterable[str] = MODELS) -> list[str]:
        """The models that have a file; ``pattern`` such as ``codecs-{}.jsonl``.

        Raises
        ------
        MissingError
            None has.
        """
        found = [model for model in among if self.has(pattern.format(model))]
        if not found:
            raise MissingError(f"there is no {self.folder / pattern.format('MODEL')}")
        return found

    def json(self, name: str) -> dict[str, Any]:
        """A file that holds one JSON object."""
        self.heads[name] = self._json(name)
        return self.heads[name]

    def lines(self, name: str) -> list[Line]:
        """The questions of a sweep."""
        self.heads[name], lines = self._lines(name)
        return lines

    def measured(self, name: str, protocol: Protocol = "A") -> Measured:
        """All rows of a sweep under one protocol."""
        self._check_protocol(name, protocol)
        return self._measured(name, protocol)

    def methods(self, name: str, protocol: Protocol = "A") -> Methods:
        """The same, grouped by method."""
        self._check_protocol(name, protocol)
        return self._methods(name, protocol)

    def _read_json(self, name: str) -> dict[str, Any]:
        self._check(name)
        found: dict[str, Any] = json.loads((self.folder / name).read_text())
        return found

    def _read_lines(self, name: str) -> tuple[dict[str, Any], list[Line]]:
        self._check(name)
        return records.read(self.folder / name)

    def _measure(self, name: str, protocol: Protocol) -> Measured:
        return Measured(self._lines(name)[1], protocol)

    def _group(self, name: str, protocol: Protocol) -> Methods:
        return Methods(self._lines(name)[1], protocol)

    def _check_protocol(self, name: str, protocol: Protocol) -> None:
        if not any(line.protocol == protocol for line in self.lines(name)):
            raise MissingError(f"{name} holds no questions under protocol {protocol}")

    def _check(self, name: str) -> None:
        if not self.has(name):
            raise MissingError(f"there is no {self.folder / name}")


def need(measured: Measured, *rows: str) -> None:
    """Refuse results without these rows."""
    absent = [row for row in rows if row not in measured.points]
    if absent:
        raise MissingError(f"the results hold no row {absent[0]}; sweep it too")


def judge(parts: Mapping[str, Mapping[str, bool]]) -> str:
    """The verdict on a claim of several parts, each true or not of each model."""
    held = {part: [model for model, holds in found.items() if holds] for part, found in parts.items()}
    if all(len(models) == len(parts[part]) for part, models in held.items()):
        return HOLDS
    if not any(held.values()):
        return FAILS
    said = [
        part if len(models) == len(parts[part]) else f"{part} on {' and '.join(models)}".strip()
        for part, models in held.items()
        if models
    ]
    return f"{PART}: {', '.join(said)}"


def within(a: Estimate, by: float = 100, digits: int = 1) -> str:
    """A figure, in percent unless told, with the wider side of its interval."""
    return f"{by * a.mean:.{digits}f}±{by * max(a.high - a.mean, a.mean - a.low):.{digits}f}"


def listed(found: Mapping[str, str], n: int, unit: str = "") -> str:
    """Figures by model, and for how many questions."""
    return f"{', '.join(f'{model} {text}' for model, text in found.items())}; n = {n}{unit}"
