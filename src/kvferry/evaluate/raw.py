"""Raw results on disk: JSON lines, the first says what was run, each other one is a question under one protocol."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from kvferry.errors import InputError

Protocol = Literal["A", "B"]


class Outcome(NamedTuple):
    """How one row did on one question; ``kl`` (nats a token, to the full cache) is only known of forced answers."""

    correct: int
    bytes: int
    kl: float | None = None


@dataclass(frozen=True)
class Line:
    """The outcome of one question under one protocol.

    ``outcomes`` maps a row name to its :class:`Outcome`: a canonical recipe (in protocol B a query-aware one is
    followed by ``proxy`` or ``oracle``), or ``image:Q`` for pictures that were sent as JPEG of quality ``Q``, or
    ``embeds:CODEC`` for their embeddings.
    """

    index: int
    kind: str
    protocol: Protocol
    bf16_bytes: int
    image_bytes: int
    tokens: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)


class _Names:
    """The rows of each protocol's first line; later lines with the same rows hold outcomes without their names."""

    def __init__(self) -> None:
        self._first: dict[str, list[str]] = {}

    def pack(self, record: dict[str, Any]) -> dict[str, Any]:
        names = list(record["outcomes"])
        if names == self._first.get(record["protocol"]):
            return record | {"outcomes": list(record["outcomes"].values())}
        self._first.setdefault(record["protocol"], names)
        return record

    def unpack(self, record: dict[str, Any]) -> dict[str, Any]:
        outcomes = record["outcomes"]
        if isinstance(outcomes, list):
            outcomes = dict(zip(self._first[record["protocol"]], outcomes, strict=True))
        self._first.setdefault(record["protocol"], list(outcomes))
        return record | {"outcomes": {name: Outcome(*x) for name, x in outcomes.items()}}


class Scribe:
    """Appends lines to a file, each on disk before the next is asked for."""

    def __init__(self, path: Path) -> None:
        self._names = _Names()
        for record in json_lines(path):
            if "sweep" not in record:
                self._names.unpack(record)
        self._file = path.open("a")

    def __enter__(self) -> Scribe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, line: Line) -> None:
        """One question more."""
        self._file.write(json.dumps(self._names.pack(asdict(line)), separators=(",", ":")) + "\n")
        self._file.flush()


def read(path: Path) -> tuple[dict[str, Any], list[Line]]:
    """Provenance and lines of a results file; a half-written last line is dropped."""
    if not path.is_file():
        raise InputError(f"no results at {path}; `kvferry sweep --out {path}` makes them")
    head: dict[str, Any] = {}
    lines = []
    names = _Names()
    for record in json_lines(path):
        if "sweep" in record:
            head = record
        else:
            lines.append(Line(**names.unpack(record)))
    if not head:
        raise InputError(f"{path} is not a results file of `kvferry sweep`")
    return head, lines


def json_lines(path: Path) -> list[Any]:
    """Every line of a file that is whole."""
    records = []
    for text in path.read_text().splitlines():
        try:
            records.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return records


def drop_half_line(path: Path) -> None:
    """Cut off what an interrupted run left of its last line."""
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rfind(b"\n") + 1])
