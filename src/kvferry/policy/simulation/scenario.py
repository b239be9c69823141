"""What is simulated, and what came of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.link.trace import Array, Trace
from kvferry.policy.points import PointTable
from kvferry.policy.situation import Context, Flags, Indices, situation

BACKLOG_BYTES = 16 * 1024
"""A shorter transfer ends before it has shown what the link can do, and teaches an estimator nothing."""
SLIGHT = 1e-9
"""Shares that differ by less are equal."""


@dataclass(frozen=True)
class Scenario:
    """Agents that ask over one uplink, many times, on several links.

    Parameters
    ----------
    tables : tuple of PointTable
        The agents take them in turn.
    traces : tuple of Trace
        Each link gets the same number of sessions, which begin at random times of it.
    context : Context
        The same for every question.
    agents : int
        On one link.
    arrivals : {"sync", "poisson"}
        All agents ask at once, ``every`` seconds; or each by itself, that often on average.
    every : float
        Seconds; with several agents in sync at least the deadline, so that rounds do not overlap.
    requests : int
        In all, about.
    episode : int
        Questions of one agent in a session. A session begins without any knowledge of its link.
    probe_bytes : int
        Where a question sends less, padding of lower priority follows it, up to so many bytes in all, until the next
        question: without that, a policy on its fallback would never hear that the link has recovered. They are counted
        among the bytes sent. 0 never probes.
    seed : int
    """

    tables: tuple[PointTable, ...]
    traces: tuple[Trace, ...]
    context: Context
    agents: int = 1
    arrivals: Literal["sync", "poisson"] = "sync"
    every: float = 5.0
    requests: int = 20_000
    episode: int = 50
    probe_bytes: int = 64 * 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.tables or not self.traces:
            raise InputError("a simulation needs points and at least one trace")
        if min(self.agents, self.requests, self.episode) < 1 or self.probe_bytes < 0 or not 0 < self.every < 86_400:
            raise InputError("agents, requests, questions per session and seconds between them are above 0")
        if self.arrivals not in ("sync", "poisson"):
            raise InputError(f"arrivals are sync or poisson, not {self.arrivals!r}")
        if self.in_rounds and self.every < self.context.deadline:
            raise InputError(
                f"agents in sync ask every {self.every:g} s, before the deadline of {self.context.deadline:g} s has "
                "passed; ask less often, or use poisson arrivals"
            )

    @property
    def in_rounds(self) -> bool:
        """Whether several agents ask at the same moment, so that the link must be shared out among them."""
        return self.arrivals == "sync" and self.agents > 1

    @property
    def lanes(self) -> int:
        """Sessions on each link; at least 2, so that there is a spread."""
        return max(2, round(self.requests / (self.episode * self.agents * len(self.traces))))

    @cached_property
    def stacked(self) -> Stacked:
        """The tables as arrays."""
        return Stacked.of(self.tables, self.context)


@dataclass(frozen=True, eq=False)
class Stacked:
    """Tables as arrays ``[tables, P]``; what fills a shorter table up is never allowed.

    ``here`` is the part of ``fixed`` that passes on the edge before the first byte.
    """

    modes: npt.NDArray[np.str_]
    quality: Array
    nbytes: Array
    here: Array
    fixed: Array
    shares: Array
    gains: Array
    allowed: Flags

    @classmethod
    def of(cls, tables: Sequence[PointTable], context: Context) -> Stacked:
        """Stack tables for one context."""
        width = max(len(table.points) for table in tables)
        rows = [situation(table.points, context) for table in tables]
        depth = max(x.shares.shape[2] for x in rows)
        here = [np.array([[x.edge_seconds + x.compress_seconds for x in table.points]]) for table in tables]

        def filled(arrays: Sequence[npt.NDArray[np.generic]], fill: object) -> npt.NDArray[np.generic]:
            return np.concatenate(
                [np.pad(a, ((0, 0), (0, width - a.shape[1])), constant_values=fill) for a in arrays]  # type: ignore[call-overload]
            )

        def deep(arrays: Sequence[Array], fill: float) -> Array:
            return np.concatenate(
                [
                    np.pad(a, ((0, 0), (0, width - a.shape[1]), (0, depth - a.shape[2])), constant_values=fill)
                    for a in arrays
                ]
            )

        return cls(
            modes=filled([x.modes for x in rows], ""),  # type: ignore[arg-type]
            quality=filled([x.quality for x in rows], 0.0),  # type: ignore[arg-type]
            nbytes=filled([x.nbytes for x in rows], 0.0),  # type: ignore[arg-type]
            here=filled(here, 0.0),  # type: ignore[arg-type]
            fixed=filled([x.fixed for x in rows], 0.0),  # type: ignore[arg-type]
            shares=deep([x.shares for x in rows], 1.0),
            gains=deep([x.gains for x in rows], 0.0),
            allowed=filled([x.allowed for x in rows], False),  # type: ignore[arg-type]
        )

    def worth_of(self, rows: Indices, at: Indices, carried: Array) -> Array:
        """What answers are worth that are made from what has arrived, -inf where it is of no use.

        Parameters
        ----------
        rows, at : int64
            Tables and points, of shapes that broadcast to that of ``carried``.
        carried : float64
            Bytes of the point that could have arrived by the time that an answer must begin; below 0 where even that
            is past.
        """
        size = np.broadcast_to(self.nbytes[rows, at], carried.shape)
        share = np.divide(carried, size, out=np.ones_like(carried), where=size > 0)
        total, usable = np.zeros_like(carried), np.zeros(carried.shape, bool)
        for step in range(self.shares.shape[2]):
            there = (carried >= 0) & (share >= self.shares[rows, at, step] - SLIGHT)
            total += np.where(there, self.gains[rows, at, step], 0.0)
            usable |= there
        worth: Array = np.where(usable & self.allowed[rows, at], total, -np.inf)
        return worth


_SUMS = ("requests", "on_time", "possible", "quality", "chosen", "nbytes", "rounds", "rounds_on_time")


@dataclass
class Outcome:
    """Sums per session, ``[sessions]`` each, in the order of the scenario's links.

    Parameters
    ----------
    requests, on_time : float64 array
        Questions, and those answered within their deadline.
    possible : float64 array
        Those that some point could have answered in time; all of them where several agents ask in sync.
    quality : float64 array
        Of the answers in time, as they were made; a late one counts 0.
    chosen : float64 array
        Of the points that were chosen, had they been in time.
    nbytes : float64 array
        Sent, probes included.
    rounds, rounds_on_time : float64 array
        Questions asked at once, and whether all of them were in time.
    modes : Counter of str
        How often each was chosen; "refused" where none was.
    """

    requests: Array
    on_time: Array
    possible: Array
    quality: Array
    chosen: Array
    nbytes: Array
    rounds: Array
    rounds_on_time: Array
    modes: Counter[str]

    @classmethod
    def empty(cls, lanes: int) -> Outcome:
        """Nothing asked yet."""
        return cls(**{name: np.zeros(lanes) for name in _SUMS}, modes=Counter())

    def add(
        self,
        modes: npt.NDArray[np.str_],
        quality: Array,
        worth: Array,
        choice: Indices,
        possible: Flags,
        nbytes: Array,
    ) -> None:
        """One question of each of ``A`` agents in every session: arrays ``[lanes, A]``; ``worth`` -inf is late."""
        on_time = np.isfinite(worth)
        self.requests += choice.shape[1]
        self.on_time += on_time.sum(1)
        self.possible += possible.sum(1)
        self.quality += np.where(on_time, worth, 0.0).sum(1)
        self.chosen += np.where(choice >= 0, quality, 0.0).sum(1)
        self.nbytes += nbytes
        self.rounds += 1
        self.rounds_on_time += on_time.all(1)
        names, counts = np.unique(np.where(choice >= 0, modes, "refused"), return_counts=True)
        self.modes.update(dict(zip(names.tolist(), counts.tolist(), strict=True)))

    @classmethod
    def joined(cls, parts: Sequence[Outcome]) -> Outcome:
        """One after another."""
        sums = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _SUMS}
        return cls(**sums, modes=sum((part.modes for part in parts), Counter()))
