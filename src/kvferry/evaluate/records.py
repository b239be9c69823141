"""Raw results on disk: JSON lines, the first says what was run, each other one is a question under one protocol.

The first is an object with the name of what was run (``sweep``, ``evaluation``) as a key.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from kvferry.errors import InputError

Protocol = Literal["A", "B"]


class Outcome(NamedTuple):
    """How one row did on one question: 1 or 0, right or wrong, or what a metric gives in between.

    How far it is from the full cache is only known of forced answers: ``kl`` in nats a token, ``attention`` as the
    error of the attention's outputs (:func:`kvferry.evaluate.divergence.output_error`). ``scored`` is the share of the
    kept tokens that the recipe's scorer chose (:attr:`kvferry.summary.Summary.scored_share`).
    """

    correct: float
    bytes: int
    kl: float | None = None
    attention: float | None = None
    scored: float | None = None


@dataclass(frozen=True)
class Line:
    """The outcome of one question under one protocol.

    ``outcomes`` maps a row name to its :class:`Outcome`: a canonical recipe (in protocol B a query-aware one is
    followed by ``proxy`` or ``oracle``), or ``image:Q`` for pictures that were sent as JPEG of quality ``Q``, or
    ``embeds:CODEC`` for their embeddings. ``bf16_bytes`` is the unpruned cache
    (:attr:`kvferry.cache.KVCache.full_bf16_bytes`), which holds ``length`` of the prompt's ``tokens``.
    Questions of one ``group`` share a picture or a text.
    """

    index: int
    kind: str
    protocol: Protocol
    bf16_bytes: int
    image_bytes: int
    tokens: int
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    length: int = 0
    group: str = ""


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
        return record | {"outcomes": outcomes}


class Scribe:
    """Appends lines to a file, each on disk before the next is asked for."""

    def __init__(self, path: Path) -> None:
        self._names = _Names()
        for record in json_lines(path)[1:]:
            self._names.unpack(record)
        self._file = path.open("a")

    def __enter__(self) -> Scribe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, line: Any) -> None:
        """One question more: a :class:`Line` or another dataclass with a protocol and outcomes by row."""
        self._file.write(json.dumps(self._names.pack(asdict(line)), separators=(",", ":")) + "\n")
        self._file.flush()


def read(path: Path) -> tuple[dict[str, Any], list[Line]]:
    """Provenance and lines of a sweep's results; a half-written last line is dropped."""
    head, records = read_records(path, "sweep")
    return head, [_line(record) for record in records]


def _line(record: dict[str, Any]) -> Line:
    outcomes = {row: Outcome(*numbers) for row, numbers in record["outcomes"].items()}
    if record.pop("old", False):
        outcomes = {row: x._replace(scored=_scored_before(row, record["length"])) for row, x in outcomes.items()}
    return Line(**record | {"outcomes": outcomes})


@lru_cache(maxsize=1 << 16)
def _scored_before(row: str, length: int) -> float | None:
    """:attr:`Outcome.scored` in files of before it was written, when recent tokens yielded to nothing but the sinks.

    None where that does not follow from the recipe and the number of tokens in the cache.
    """
    from kvferry.recipe import Recipe
    from kvferry.selection import SINKS, kept_count
    from kvferry.selection.budgets import Uniform as EvenBudget
    from kvferry.selection.modality import Uniform as NoPolicy

    if row.startswith(("image:", "embeds:")):
        return None
    recipe = Recipe.parse(row.split(" ")[0])
    scorer, even = recipe.selection, isinstance(recipe.budget, EvenBudget) and isinstance(recipe.modality, NoPolicy)
    if not even or recipe.bytes is not None or hasattr(scorer, "select"):
        return None
    keep = kept_count(recipe.fraction, length)
    free = keep - min(SINKS, keep)
    if free and hasattr(scorer, "unseen"):
        return None
    recent = int(scorer.recent(keep)) if hasattr(scorer, "recent") else 0
    return round((free - min(recent, free)) / keep, 4)


def read_records(path: Path, what: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Provenance and lines, as they are stored but for the names of rows, of the results of a ``what``.

    Raises
    ------
    InputError
        There is no such file, or it holds something else.
    """
    command = {"sweep": "kvferry sweep", "evaluation": "kvferry eval"}[what]
    if not path.is_file():
        raise InputError(f"no results at {path}; `{command} --out {path}` makes them")
    records = json_lines(path)
    if kind_of(path) != what:
        raise InputError(f"{path} is not a results file of `{command}`")
    names = _Names()
    return records[0], [with_length(names.unpack(record)) for record in records[1:]]


def with_length(record: dict[str, Any]) -> dict[str, Any]:
    """``record`` as it is written today.

    Files of before ``length`` was written took the whole prompt for the size of the unpruned cache. Under protocol A
    the cache holds one token less: the last one is fed again on resuming.
    """
    tokens, protocol = record.get("tokens", 0), record["protocol"]
    if "length" in record or not tokens:
        return record
    length = tokens - 1 if protocol == "A" else tokens
    return record | {"length": length, "bf16_bytes": record["bf16_bytes"] // tokens * length, "old": True}


def kind_of(path: Path) -> str:
    """What was run to make a results file; empty where it is none."""
    try:
        with path.open(encoding="utf-8") as lines:
            head = json.loads(lines.readline())
    except (ValueError, OSError):
        return ""
    return next((kind for kind in ("sweep", "evaluation") if isinstance(head, dict) and kind in head), "")


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
    with path.open("r+b") as file:  # in its place: nothing is written, so that a full disk does no harm
        file.truncate(whole.rfind(b"\n") + 1)
