"""What a page shows of one raw file under one protocol: every row with its intervals, and which rows nothing beats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvferry.errors import InputError
from kvferry.evaluate.measured import SAME, Measured, Point
from kvferry.evaluate.records import read
from kvferry.evaluate.tables import PROTOCOLS, chose_little
from kvferry.selection import SCORED
from kvferry.statistics import Estimate, estimate_of

ORIGIN = ("command", "commit", "model", "fingerprint", "dtype", "torch", "transformers", "python", "machine")
"""What is told of where results come from."""
GOOD = 0.95
LITTLE = f"the scorer chose less than {SCORED:.0%} of the tokens that were kept"


@dataclass(frozen=True)
class Kind:
    """Right answers to one kind of question, with the 95 % interval."""

    name: str
    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One row of results.

    Parameters
    ----------
    role : {"", "ceiling", "floor", "oracle"}
        ``oracle`` rows know a question that no deployment knows; they are on no front.
    bytes, smaller : float
        Mean of whole bitstreams, and how many times less that is than the cache in BF16.
    accuracy, low, high, of_full : float
        Of all questions, the interval, and the share of the ceiling's.
    against : str
        What is shown against the ceiling, in words.
    kl, moved : float or None
        To the full cache: nats a token, and relative error of the attention's outputs.
    scored : float or None
        Share of the kept tokens that the scorer chose.
    note : str
        Where that is little.
    front : bool
        No other deployable row has fewer bytes and no fewer right answers.
    """

    name: str
    family: str
    role: str
    bytes: float
    smaller: float
    accuracy: float
    low: float
    high: float
    of_full: float
    against: str
    kl: float | None
    moved: float | None
    scored: float | None
    note: str
    front: bool
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Sheet:
    """One raw file under one protocol."""

    title: str
    protocol: str
    meaning: str
    split: str
    n: int
    bf16: float
    rows: tuple[Row, ...]
    origin: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def sheets(path: Path) -> Iterator[Sheet]:
    """Of one raw file, one for each protocol.

    Raises
    ------
    InputError
        It holds no results, or none of the full cache.
    """
    head, lines = read(path)
    if not lines:
        raise InputError(f"{path} holds no question yet; run its sweep again, it goes on where it stopped")
    for protocol, meaning in PROTOCOLS.items():
        if not any(x.protocol == protocol for x in lines):
            continue
        measured = Measured(lines, protocol)
        yield Sheet(
            title=path.stem,
            protocol=protocol,
            meaning=meaning,
            split=str(head["sweep"]["split"]),
            n=measured.n,
            bf16=measured.bf16,
            rows=_rows(measured),
            origin={key: str(head[key]) for key in ORIGIN if head.get(key)},
        )


def good_recipes(sheet: Sheet, most: int = 3) -> list[str]:
    """Recipes that leave some tokens out and keep :data:`GOOD` of full, the fewest bytes of each selection first."""
    found: dict[str, str] = {}
    for row in sorted(sheet.rows, key=lambda x: x.bytes):
        point = Point(row.name)
        if point.recipe and point.deployable and not point.whole and row.role == "" and row.of_full >= GOOD:
            found.setdefault(point.base, row.name.partition(" ")[0])
    return list(found.values())[:most]


def _rows(measured: Measured) -> tuple[Row, ...]:
    unbeaten = front(measured)
    by_kind = {kind: measured.of_kind(kind) for kind in measured.kinds()}
    rows = []
    for point in measured.by_size(list(measured.points.values())):
        name, accuracy = point.name, measured.accuracy(point.name)
        kinds = [(kind, estimate_of(means[name], n)) for kind, (n, means) in by_kind.items()]
        rows.append(
            Row(
                name=name,
                family=point.family,
                role=_role(measured, point),
                bytes=measured.bytes[name],
                smaller=measured.bf16 / measured.bytes[name],
                accuracy=accuracy.mean,
                low=accuracy.low,
                high=accuracy.high,
                of_full=measured.of_full(name).mean,
                against=measured.compare(name, measured.full).words if name != measured.full else SAME,
                kl=_mean(measured.kl(name)),
                moved=_mean(measured.moved(name)),
                scored=(scored := measured.scored(name)),
                note=LITTLE if chose_little(scored) else "",
                front=name in unbeaten,
                kinds=tuple(Kind(kind, x.n, x.mean, x.low, x.high) for kind, x in kinds),
            )
        )
    return tuple(rows)


def front(measured: Measured) -> set[str]:
    """Deployable rows that no other beats in bytes without being right less often."""
    rows = sorted(
        (p.name for p in measured.points.values() if p.deployable),
        key=lambda name: (measured.bytes[name], -measured.accuracy(name).mean),
    )
    found: set[str] = set()
    best = -1.0
    for name in rows:
        accuracy = measured.accuracy(name).mean
        if accuracy > best:
            found.add(name)
            best = accuracy
    return found


def _role(measured: Measured, point: Point) -> str:
    if point.name in (measured.full, measured.floor):
        return "ceiling" if point.name == measured.full else "floor"
    return "" if point.deployable else "oracle"


def _mean(found: Estimate | None) -> float | None:
    return None if found is None else found.mean
