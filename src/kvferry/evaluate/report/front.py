"""What a page shows of one raw file under one protocol: every row with its intervals, and which rows nothing beats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvferry.errors import InputError
from kvferry.evaluate.evaluation_tables import PROTOCOLS as OF_EVALUATIONS
from kvferry.evaluate.measured import SAME, Measured, Point
from kvferry.evaluate.results import Results, read_results
from kvferry.evaluate.tables import PROTOCOLS, chose_little
from kvferry.selection import SCORED
from kvferry.statistics import TOO_FEW, Estimate, estimate_of

ORIGIN = (
    "command", "commit", "model", "fingerprint", "dtype", "architecture", "parameters", "torch", "transformers",
    "python", "machine",
)  # fmt: skip
"""What is told of where results come from."""
GOOD = 0.95
LITTLE = f"the scorer chose less than {SCORED:.0%} of the tokens that were kept"


@dataclass(frozen=True)
class Kind:
    """The mean score of one kind of question, with the 95 % interval."""

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
        Mean of whole bitstreams, and how many times less that is than the cache in BF16; None where nothing crosses.
    accuracy, low, high : float
        The mean score of all questions as it is shown, and its interval.
    of_full : float or None
        The share of the ceiling's; None where a lower score is better.
    against : str
        What is shown against the ceiling, in words.
    kl, moved : float or None
        To the full cache: nats a token, and relative error of the attention's outputs.
    scored : float or None
        Share of the kept tokens that the scorer chose.
    note : str
        Where that is little.
    front : bool
        No other deployable row has fewer bytes and no worse score.
    """

    name: str
    family: str
    role: str
    bytes: float
    smaller: float | None
    accuracy: float
    low: float
    high: float
    of_full: float | None
    against: str
    kl: float | None
    moved: float | None
    scored: float | None
    note: str
    front: bool
    kinds: tuple[Kind, ...]


@dataclass(frozen=True)
class Sheet:
    """One raw file under one protocol.

    Parameters
    ----------
    score : str
        What is called ``accuracy`` in rows.
    most : float
        The highest end of an interval, at least 1.
    asked, model : str
        Where the questions are from, and what is known of the model.
    split : str
        Of drawn scenes; empty for other questions.
    ships : bool
        Whether the model comes with the project.
    """

    title: str
    protocol: str
    meaning: str
    score: str
    most: float
    asked: str
    model: str
    split: str
    ships: bool
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
    found = read_results(path)
    drawn = "sweep" in found.head or found.plan["task"] == "testbed"
    for protocol in found.protocols:
        measured = Measured(found.lines, protocol)
        if found.higher_is_better and not measured.accuracy(measured.full).mean:
            raise InputError(
                f"{path}: the full cache scores 0 under protocol {protocol}, so there is nothing to compare; its "
                "command says what the model answers instead, and what helps"
            )
        rows = _rows(measured, found)
        yield Sheet(
            title=path.stem,
            protocol=protocol,
            meaning=(PROTOCOLS if "sweep" in found.head else OF_EVALUATIONS)[protocol],
            score=found.score,
            most=max(1.0, *(row.high for row in rows)),
            asked=found.asked,
            model=found.model,
            split=(found.plan["split"] or "validation") if drawn else "",
            ships=found.ships,
            n=measured.n,
            bf16=measured.bf16,
            rows=rows,
            origin={key: str(found.head[key]) for key in ORIGIN if found.head.get(key)},
        )


def good_recipes(sheet: Sheet, most: int = 3) -> list[str]:
    """Recipes that leave some tokens out and keep :data:`GOOD` of full, the fewest bytes of each selection first."""
    found: dict[str, str] = {}
    for row in sorted(sheet.rows, key=lambda x: x.bytes):
        point = Point(row.name)
        if point.recipe and point.deployable and not point.whole and row.role == "" and (row.of_full or 0) >= GOOD:
            found.setdefault(point.base, row.name.partition(" ")[0])
    return list(found.values())[:most]


def _rows(measured: Measured, found: Results) -> tuple[Row, ...]:
    unbeaten = front(measured, found.higher_is_better)
    by_kind = {kind: measured.of_kind(kind) for kind in measured.kinds() if kind}
    rows = []
    for point in measured.by_size(list(measured.points.values())):
        name, accuracy = point.name, _shown(measured.accuracy(point.name), found)
        kinds = [(kind, _shown(estimate_of(means[name], n), found)) for kind, (n, means) in by_kind.items()]
        rows.append(
            Row(
                name=name,
                family=point.family,
                role=_role(measured, point),
                bytes=measured.bytes[name],
                smaller=measured.bf16 / measured.bytes[name] if measured.bytes[name] else None,
                accuracy=accuracy.mean,
                low=accuracy.low,
                high=accuracy.high,
                of_full=measured.of_full(name).mean if found.higher_is_better else None,
                against=_against(measured, name, found),
                kl=_mean(measured.kl(name)),
                moved=_mean(measured.moved(name)),
                scored=(scored := measured.scored(name)),
                note=LITTLE if chose_little(scored) else "",
                front=name in unbeaten,
                kinds=tuple(Kind(kind, x.n, x.mean, x.low, x.high) for kind, x in kinds),
            )
        )
    return tuple(rows)


def _shown(mean: Estimate, found: Results) -> Estimate:
    return Estimate(found.shown(mean.mean), found.shown(mean.low), found.shown(mean.high), mean.n)


def _against(measured: Measured, name: str, found: Results) -> str:
    """What the interval of the paired difference to the ceiling shows."""
    if name == measured.full:
        return SAME
    compared = measured.compare(name, measured.full)
    if found.metric is None or compared.words in (SAME, TOO_FEW):
        return compared.words
    return "higher" if compared.difference.mean > 0 else "lower"


def front(measured: Measured, higher_is_better: bool = True) -> set[str]:
    """Deployable rows that no other beats in bytes without a worse score."""
    sign = 1 if higher_is_better else -1
    rows = sorted(
        (p.name for p in measured.points.values() if p.deployable),
        key=lambda name: (measured.bytes[name], -sign * measured.accuracy(name).mean),
    )
    found: set[str] = set()
    best = -float("inf")
    for name in rows:
        score = sign * measured.accuracy(name).mean
        if score > best:
            found.add(name)
            best = score
    return found


def _role(measured: Measured, point: Point) -> str:
    if point.name in (measured.full, measured.floor):
        return "ceiling" if point.name == measured.full else "floor"
    return "" if point.deployable else "oracle"


def _mean(found: Estimate | None) -> float | None:
    return None if found is None else found.mean
