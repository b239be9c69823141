"""What a link offers over time: packet opportunities as Mahimahi records them, or rates that hold for a while.

Both answer the same two questions, for arrays as well as for single times: how many bytes were offered before a time,
and when has so much been offered. A transfer of ``n`` bytes that starts at ``t`` on an idle link ends at
``time_of(offered(t) + n)``; what was offered while nothing waited is lost. Traces repeat for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.files import write_whole

Array = npt.NDArray[np.float64]
PACKET_BYTES = 1500
TRACES = Path(__file__).with_name("traces")
MAX_MS = 2**31
"""A trace of more than 24 days is a mistake."""


class Trace(Protocol):
    """A link's capacity from time 0 on, in seconds and bytes."""

    @property
    def period(self) -> float:
        """Seconds after which it repeats."""

    @property
    def period_bytes(self) -> float:
        """Bytes offered in one period."""

    def offered(self, seconds: npt.ArrayLike) -> Array:
        """Bytes offered before each time."""

    def time_of(self, nbytes: npt.ArrayLike) -> Array:
        """The earliest time by which so many bytes have been offered."""


@dataclass(frozen=True, eq=False)
class PacketTrace:
    """Opportunities to deliver 1,500 bytes each, as recorded by Mahimahi (Netravali et al., USENIX ATC 2015).

    Parameters
    ----------
    opportunities : int64 array
        Their milliseconds, not decreasing, the last one above 0: there the trace starts again.
    """

    opportunities: npt.NDArray[np.int64]

    def __post_init__(self) -> None:
        ms = self.opportunities
        if not ms.size or ms[0] < 0 or (np.diff(ms) < 0).any() or not 0 < ms[-1] < MAX_MS:
            raise InputError("opportunities are milliseconds from 0 on, in order, and do not all lie at 0")

    @property
    def period(self) -> float:
        return float(self.opportunities[-1]) / 1000

    @property
    def period_bytes(self) -> float:
        return float(PACKET_BYTES * len(self.opportunities))

    def offered(self, seconds: npt.ArrayLike) -> Array:
        cycle, rest = np.divmod(_milliseconds(seconds), self.opportunities[-1])
        before = np.searchsorted(self.opportunities, rest, side="left")
        # What lies at the very end of a cycle belongs to the next one's 0, and has not passed yet there.
        at_end = len(self.opportunities) - np.searchsorted(self.opportunities, self.opportunities[-1], side="left")
        before = before - np.where((rest == 0) & (cycle > 0), at_end, 0)
        count = np.multiply(PACKET_BYTES, cycle * len(self.opportunities) + before, dtype=np.float64)
        return np.asarray(count)

    def time_of(self, nbytes: npt.ArrayLike) -> Array:
        index = np.ceil(np.asarray(nbytes, np.float64) / PACKET_BYTES).astype(np.int64) - 1
        cycle, rest = np.divmod(np.maximum(index, 0), len(self.opportunities))
        time: Array = np.where(index < 0, 0.0, (cycle * self.opportunities[-1] + self.opportunities[rest]) / 1000)
        return time


@dataclass(frozen=True, eq=False)
class RateTrace:
    """Rates that hold for ``step`` seconds each, zero among them.

    Parameters
    ----------
    bits_per_second : float64 array
    step : float
        Seconds.
    """

    bits_per_second: Array
    step: float

    def __post_init__(self) -> None:
        rates = self.bits_per_second
        if not (rates.size and np.isfinite(rates).all() and (rates >= 0).all() and rates.any() and self.step > 0):
            raise InputError("a trace has finite rates of 0 or more, not all 0, that hold for more than 0 seconds")

    @property
    def period(self) -> float:
        return len(self.bits_per_second) * self.step

    @property
    def period_bytes(self) -> float:
        return float(self._offered[-1])

    @cached_property
    def _offered(self) -> Array:
        """Bytes offered by the end of each step, from 0 on: ``[steps + 1]``."""
        result: Array = np.concatenate([[0.0], np.cumsum(self.bits_per_second) * self.step / 8])
        return result

    def offered(self, seconds: npt.ArrayLike) -> Array:
        cycle, rest = np.divmod(np.asarray(seconds, np.float64), self.period)
        part = np.interp(rest, np.arange(len(self._offered)) * self.step, self._offered)
        total: Array = cycle * self.period_bytes + part
        return total

    def time_of(self, nbytes: npt.ArrayLike) -> Array:
        wanted = np.asarray(nbytes, np.float64)
        cycle = np.maximum(np.ceil(wanted / self.period_bytes) - 1, 0)
        rest = np.clip(wanted - cycle * self.period_bytes, 0, self.period_bytes)
        step = np.maximum(np.searchsorted(self._offered, rest, side="left") - 1, 0)
        # The first step may offer nothing, and then nothing was asked of it either.
        rate = np.maximum(self.bits_per_second[step] / 8, np.finfo(float).tiny)
        within = np.minimum((rest - self._offered[step]) / rate, self.step)
        time: Array = cycle * self.period + step * self.step + within
        return time


def mean_rate(trace: Trace) -> float:
    """Bits per second over a whole period."""
    return 8 * trace.period_bytes / trace.period


def transfer_end(trace: Trace, start: npt.ArrayLike, nbytes: npt.ArrayLike, share: npt.ArrayLike = 1.0) -> Array:
    """When transfers end that each have a fixed ``share`` of the link from ``start`` (seconds) on."""
    needed = np.asarray(nbytes, np.float64) / np.asarray(share, np.float64)
    end: Array = np.maximum(np.asarray(start, np.float64), trace.time_of(trace.offered(start) + needed))
    return end


def read_trace(name: str | Path, scale: float = 1.0) -> Trace:
    """A trace from a file: Mahimahi's format, or ``.tsv`` with seconds and Mbit/s in equal steps.

    Parameters
    ----------
    name : str or Path
        A file, or the name of a shipped trace (:func:`shipped_traces`).
    scale : float
        Multiplies rates; Mahimahi's opportunities are what they are and take no scale but 1.

    Raises
    ------
    InputError
        There is no such file, or a line of it is wrong; the message names the line.
    """
    path = Path(name)
    if not path.is_file() and str(name) in shipped_traces():
        path = TRACES / f"{name}.txt"
    try:
        lines = path.read_text("ascii").splitlines()
    except OSError as error:
        shipped = ", ".join(shipped_traces())
        raise InputError(f"cannot read the trace {name} ({error.strerror}); give a file, or one of {shipped}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a trace but binary; give a text file of milliseconds") from None
    if path.suffix == ".tsv":
        return _read_rates(path, lines, scale)
    if scale != 1.0:
        raise InputError(f"{path} holds packet opportunities, which cannot be scaled; leave the scale at 1")
    return _read_packets(path, lines)


def write_trace(trace: Trace, path: Path) -> None:
    """One period in Mahimahi's format, times rounded up to the millisecond.

    The format repeats from its last opportunity: an outage at the very end is lost.

    Raises
    ------
    InputError
        The trace offers no whole packet in its first period, or the file cannot be written.
    """
    count = int(trace.period_bytes // PACKET_BYTES)
    if not count:
        raise InputError("the trace offers less than one packet of 1,500 bytes; make it longer or faster")
    times = trace.time_of(PACKET_BYTES * np.arange(1, count + 1))
    ms = np.maximum(np.ceil(times * 1000 - 1e-6), 0).astype(np.int64)
    try:
        write_whole(path, "".join(f"{x}\n" for x in ms))
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another file") from None


def shipped_traces() -> tuple[str, ...]:
    """Names of the synthetic traces that come with the package."""
    return tuple(sorted(path.stem for path in TRACES.glob("*.txt")))


def _milliseconds(seconds: npt.ArrayLike) -> Array:
    """Rounded to a nanosecond, so that 0.057 s is not a little more than 57 ms."""
    result: Array = np.round(np.asarray(seconds, np.float64) * 1000, 6)
    return result


def _read_packets(path: Path, lines: list[str]) -> PacketTrace:
    times = np.empty(len(lines), np.int64)
    before = 0
    for number, line in enumerate(lines, 1):
        if not (line.isdigit() and int(line) < MAX_MS):
            raise _wrong(path, number, line, "a line is one whole number of milliseconds, 0 or more")
        times[number - 1] = ms = int(line)
        if ms < before:
            raise _wrong(path, number, line, f"times do not decrease, and the line before says {before}")
        before = ms
    if not before:
        raise InputError(f"{path}: line {max(len(lines), 1)}: the last time must be above 0; that is where it repeats")
    return PacketTrace(times)


def _read_rates(path: Path, lines: list[str], scale: float) -> RateTrace:
    rows: list[tuple[float, float]] = []
    for number, line in enumerate(lines, 1):
        try:
            second, mbit = (float(x) for x in line.split("\t"))
        except ValueError:
            raise _wrong(path, number, line, "a line is seconds, a tab, and Mbit/s") from None
        step = rows[1][0] - rows[0][0] if len(rows) > 1 else second - rows[0][0] if rows else 1.0
        even = not rows or (step > 0 and abs(second - rows[-1][0] - step) <= 1e-6 * max(1.0, abs(second)))
        if not (even and np.isfinite(second) and np.isfinite(mbit) and mbit >= 0):
            raise _wrong(path, number, line, "times go up in equal steps and rates are 0 or more")
        rows.append((second, mbit))
    if len(rows) < 2 or not any(mbit for _, mbit in rows):
        raise InputError(f"{path}: line {max(len(rows), 1)}: a trace needs two lines and a rate above 0")
    return RateTrace(np.array([scale * 1e6 * mbit for _, mbit in rows]), rows[1][0] - rows[0][0])


def _wrong(path: Path, number: int, line: str, rule: str) -> InputError:
    return InputError(f"{path}: line {number}: {line[:40]!r} cannot be right: {rule}")
