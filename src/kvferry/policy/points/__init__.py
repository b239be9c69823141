"""What a mode costs and how good its answers are: measured elsewhere, read from a file."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kvferry.errors import InputError
from kvferry.files import write_whole

KINDS = ("image", "embeds", "kv", "translate", "scout", "prompt", "local")
CACHES = ("kv", "translate")
"""Kinds of mode that may travel in tiers."""
FALLBACKS = ("scout", "prompt", "local")
"""Kinds of mode whose payload is next to nothing: what is left when a link can carry no more."""
NEEDS = ("pixels", "embeds", "held_picture")
FORMAT = "kvferry-points/1"
SHIPPED = Path(__file__).parent
_SECONDS = ("edge_seconds", "compress_seconds", "decompress_seconds", "cloud_seconds", "prefill_seconds")


@dataclass(frozen=True)
class OperatingPoint:
    """A mode with its measured quality, bytes and seconds on a given model and pair of devices.

    Parameters
    ----------
    mode : str
        A kind of mode (``image``, ``embeds``, ``kv``, ``scout``, ``prompt``, ``local``), and after a colon what it is
        made with: ``kv:q2c@0.25|int4``.
    quality : float
        Whatever the table measures, on the same questions for all its points; 0 or more.
    nbytes : int
        Everything that crosses the wire.
    edge_seconds, compress_seconds, decompress_seconds, cloud_seconds : float
        On the edge before the first byte, then encoding; in the cloud decoding, then up to what the deadline is about:
        the first token, or the last one in tables of ``kvferry profile``.
    needs : tuple of str
        ``pixels`` or ``embeds`` where these leave the device, ``held_picture`` where the cloud must hold it already.
    n : int
        Questions it was measured on; 0 where that is not known.
    interval : tuple of float
        Of the quality, lower and upper end, where it is known.
    prefill_seconds : float
        The part of ``cloud_seconds`` that is prefill; 0 where there is none, or where it is not known.
    tiers : int
        In how many parts a cache travels, the most important tokens first.
    anytime : tuple of (share, quality)
        What an answer is worth that is made from so large a share of the bytes, rising; from less than the first one
        none can be made. Empty where nothing short of everything is of use.
    """

    mode: str
    quality: float
    nbytes: int
    edge_seconds: float = 0.0
    compress_seconds: float = 0.0
    decompress_seconds: float = 0.0
    cloud_seconds: float = 0.0
    needs: tuple[str, ...] = ()
    n: int = 0
    interval: tuple[float, ...] = ()
    prefill_seconds: float = 0.0
    tiers: int = 1
    anytime: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"{self.mode!r} begins with no mode; use one of {', '.join(KINDS)}")
        numbers = (self.quality, self.nbytes, *(getattr(self, name) for name in _SECONDS))
        if not all(math.isfinite(x) and x >= 0 for x in numbers):
            raise InputError(f"the point {self.mode}: quality, bytes and seconds are finite and not below 0")
        if self.is_local and self.nbytes:
            raise InputError(f"mode local sends nothing, but its point says {self.nbytes} bytes")
        if self.interval and not (len(self.interval) == 2 and self.interval[0] <= self.quality <= self.interval[1]):
            raise InputError(
                f"the point {self.mode}: an interval lies around the quality, which {self.interval} do not"
            )
        if self.prefill_seconds > self.cloud_seconds:
            raise InputError(f"the point {self.mode}: prefill_seconds are a part of cloud_seconds, not more")
        shares = [0.0, *(share for share, _ in self.anytime), 1.0]
        worths = [worth for _, worth in self.anytime]
        if not (all(a < b for a, b in pairwise(shares)) and all(math.isfinite(x) and x >= 0 for x in worths)):
            raise InputError(f"the point {self.mode}: anytime has shares, rising between 0 and 1, and qualities")
        if self.tiers < 1 or (self.kind not in CACHES and (self.tiers > 1 or self.anytime)):
            raise InputError(f"the point {self.mode}: only a cache (kv, translate) travels in tiers, at least one")
        if unknown := set(self.needs) - set(NEEDS):
            raise InputError(f"the point {self.mode} needs {', '.join(sorted(unknown))}; known are {', '.join(NEEDS)}")

    @property
    def kind(self) -> str:
        """The mode without what it is made with."""
        return self.mode.partition(":")[0]

    @property
    def steps(self) -> tuple[tuple[float, float], ...]:
        """``anytime``, and what everything is worth."""
        return (*self.anytime, (1.0, self.quality))

    @property
    def is_local(self) -> bool:
        """Whether the edge answers by itself: no bytes, no round trip, no queue."""
        return self.kind == "local"

    @property
    def prefills(self) -> bool:
        """Whether the cloud prefills for it, and so waits where others prefill."""
        return self.kind not in ("kv", "local")


@dataclass(frozen=True)
class PointTable:
    """The points of one edge and cloud, and where they come from."""

    name: str
    points: tuple[OperatingPoint, ...]
    source: str = ""

    def __post_init__(self) -> None:
        modes = [(point.mode, "held_picture" in point.needs) for point in self.points]
        if not modes or len(set(modes)) < len(modes):
            raise InputError(
                f"the table {self.name} needs at least one point, and each mode once (and once with held_picture)"
            )


def read_points(name: str | Path) -> tuple[PointTable, ...]:
    """The tables of a JSON file, or of a shipped one by its name (``scout-paper``).

    Raises
    ------
    InputError
        There is no such file, or it is not a table of points; the message says what is wrong with it.
    """
    path = Path(name)
    shipped = sorted(file.stem for file in SHIPPED.glob("*.json"))
    if not path.is_file() and str(name) in shipped:
        path = SHIPPED / f"{name}.json"
    try:
        data = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the points {name} ({error.strerror}); give a file, or one of {', '.join(shipped)}"
        ) from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); `write_points` makes such files") from None
    if not (isinstance(data, dict) and data.get("format") == FORMAT and isinstance(data.get("tables"), dict)):
        raise InputError(f'{path} is no table of points; it needs "format": "{FORMAT}" and "tables": {{...}}')
    try:
        return tuple(_table(key, value) for key, value in data["tables"].items())
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: a point has mode, quality, bytes, and perhaps seconds and needs ({error})") from None


def write_points(tables: tuple[PointTable, ...], path: Path) -> None:
    """The file :func:`read_points` reads.

    Raises
    ------
    InputError
        The file cannot be written.
    """
    data = {"format": FORMAT, "tables": {x.name: {"source": x.source, "points": _records(x)} for x in tables}}
    try:
        write_whole(path, json.dumps(data, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another file") from None


def _table(name: str, data: dict[str, Any]) -> PointTable:
    points = []
    for record in data["points"]:
        fields = {**record, "nbytes": record["bytes"], "needs": tuple(record.get("needs", ()))}
        fields["interval"] = tuple(record.get("interval", ()))
        fields["anytime"] = tuple((float(share), float(worth)) for share, worth in record.get("anytime", ()))
        del fields["bytes"]
        points.append(OperatingPoint(**fields))
    return PointTable(name, tuple(points), data.get("source", ""))


def _records(table: PointTable) -> list[dict[str, Any]]:
    """Zeros and empty needs are left out."""
    records = []
    for point in table.points:
        names = (*_SECONDS, "needs", "n", "interval", "anytime")
        rest = {name: value for name in names if (value := getattr(point, name))}
        rest |= {"tiers": point.tiers} if point.tiers > 1 else {}
        records.append({"mode": point.mode, "quality": point.quality, "bytes": point.nbytes, **rest})
    return records
