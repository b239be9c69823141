"""What a decision is made from: deadline, privacy, queues, the link, and how long each point would take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvferry.errors import InputError
from kvferry.link.trace import Array
from kvferry.policy.points import OperatingPoint

PRIVACY = {"no-pixels": "pixels", "no-embeds": "embeds"}
"""A rule, and what may then not leave the device."""

Flags = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Context:
    """One question's circumstances.

    Parameters
    ----------
    deadline : float
        Seconds from the question to the first answer token.
    rtt_seconds : float
    queue_seconds : float
        How long the cloud lets every question wait.
    prefill_queue_seconds : float
        How much longer one waits that the cloud must prefill.
    privacy : frozenset of str
        ``no-pixels``, ``no-embeds``.
    holds : frozenset of str
        What the session in the cloud holds: ``held_picture``.
    """

    deadline: float
    rtt_seconds: float = 0.0
    queue_seconds: float = 0.0
    prefill_queue_seconds: float = 0.0
    privacy: frozenset[str] = frozenset()
    holds: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not 0 < self.deadline <= 86_400:
            raise InputError(f"a deadline is a positive number of seconds, at most a day, not {self.deadline}")
        waits = (self.rtt_seconds, self.queue_seconds, self.prefill_queue_seconds)
        if not all(0 <= x < float("inf") for x in waits):
            raise InputError("round trip and queues take 0 or more seconds")
        if unknown := self.privacy - set(PRIVACY):
            raise InputError(f"there is no privacy rule {', '.join(sorted(unknown))}; use {', '.join(PRIVACY)}")
        if unknown := self.holds - {"held_picture"}:
            raise InputError(f"a session does not hold {', '.join(sorted(unknown))}; it may hold held_picture")

    def refusal(self, point: OperatingPoint) -> str:
        """Why a point is not allowed here, or nothing."""
        if broken := broken_rule(point.needs, self.privacy):
            return broken
        if "held_picture" in point.needs and "held_picture" not in self.holds:
            return "the cloud does not hold the picture yet"
        return ""

    def fixed_seconds(self, point: OperatingPoint) -> float:
        """All of ``T`` but the transfer: ``T_edge + T_compress + RTT + queue + T_decompress + T_cloud``."""
        here = point.edge_seconds + point.compress_seconds
        if point.is_local:
            return here
        waiting = self.queue_seconds + (self.prefill_queue_seconds if point.prefills else 0.0)
        return here + self.rtt_seconds + waiting + point.decompress_seconds + point.cloud_seconds


def broken_rule(leaves: Collection[str], privacy: Collection[str]) -> str:
    """Which privacy rule is broken where all of ``leaves`` leave the device, and how; or nothing."""
    broken = ((rule, what) for rule, what in PRIVACY.items() if rule in privacy and what in leaves)
    return next((f"{rule}: its {what} would leave the device" for rule, what in broken), "")


@dataclass(frozen=True)
class Situation:
    """Many decisions at once, one per lane; tables of ``P`` points are ``[lanes, P]`` or, where shared, ``[1, P]``.

    Parameters
    ----------
    modes : str array
    quality, nbytes, fixed : float64 array
        ``fixed`` is :meth:`Context.fixed_seconds`.
    shares, gains : float64 array
        :attr:`OperatingPoint.steps`, ``[..., P, K]``: from which share of its bytes on an answer is worth how much more
        than from less. Filled up with 1 and 0.
    allowed : bool array
    deadline : float
    rate : float64 ``[lanes]``
        Forecast in bits per second, NaN where nothing is known.
    ratios : float64 ``[lanes, window]``
        The forecast's past errors, actual over predicted; NaN where there is none yet, 0 wide where none are kept.
    backlog : float64 ``[lanes]``
        Bytes of earlier questions that go first.
    last : int64 ``[lanes]``
        What was chosen the time before, -1 for nothing.
    true_worth : float64 ``[lanes, P]`` or None
        What each point's answer will be worth, -inf where there will be none in time: only a simulator knows.
    """

    modes: npt.NDArray[np.str_]
    quality: Array
    nbytes: Array
    fixed: Array
    shares: Array
    gains: Array
    allowed: Flags
    deadline: float
    rate: Array
    ratios: Array
    backlog: Array
    last: Indices
    true_worth: Array | None = None
    needed: Array = field(init=False, repr=False)
    """Bits per second that would just do, ``[lanes, P]``: 0 for what sends nothing, inf for what cannot be in time."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "needed", self.needed_for(np.float64(1.0)))

    def needed_for(self, share: Array | np.float64) -> Array:
        """Bits per second that would just bring a share of each point in time, ``[lanes, P]``; see :attr:`needed`."""
        spare = self.deadline - self.fixed
        bits = np.where(self.nbytes > 0, 8 * (share * self.nbytes + self.backlog[:, None]), 0.0)
        in_time = np.divide(bits, spare, out=np.full(bits.shape, np.inf), where=np.broadcast_to(spare > 0, bits.shape))
        needed = np.where((bits == 0) & (spare >= 0), 0.0, in_time)
        return np.where(self.allowed, needed, np.inf)

    def fits(self, rate: Array) -> Flags:
        """Which points would be in time at a rate ``[lanes]``; where it is NaN, those that send nothing."""
        with np.errstate(invalid="ignore"):
            return np.asarray((self.needed <= rate[:, None]) | (self.needed == 0))

    def best(self, ok: Flags, value: Array) -> Indices:
        """The point of highest value among ``ok`` (fewer bytes win a tie), else the :meth:`last_resort`."""
        value = np.broadcast_to(value, ok.shape)
        top = np.where(ok, value, -np.inf).max(axis=1, keepdims=True)
        cost = np.where(ok & (value == top), self.nbytes, np.inf)
        return np.where(ok.any(axis=1), cost.argmin(axis=1), self.last_resort())

    def last_resort(self) -> Indices:
        """What asks least of the link, of what an endless rate would carry in time; -1 where there is none."""
        least = self.needed.argmin(axis=1)
        return np.where(np.isfinite(self.needed.min(axis=1)), least, -1)


def situation(
    points: Sequence[OperatingPoint],
    context: Context,
    rate: float | None = None,
    ratios: Sequence[float] | None = None,
    last: int = -1,
) -> Situation:
    """One decision as a :class:`Situation` of one lane."""
    shares, gains = steps_of(points)
    return Situation(
        modes=np.array([[point.mode for point in points]]),
        quality=np.array([[point.quality for point in points]], np.float64),
        nbytes=np.array([[point.nbytes for point in points]], np.float64),
        fixed=np.array([[context.fixed_seconds(point) for point in points]], np.float64),
        shares=shares[None],
        gains=gains[None],
        allowed=np.array([[not context.refusal(point) for point in points]], bool),
        deadline=context.deadline,
        rate=np.array([np.nan if rate is None else rate], np.float64),
        ratios=np.empty((1, 0)) if ratios is None else np.array([ratios or [np.nan]], np.float64),
        backlog=np.zeros(1),
        last=np.array([last], np.int64),
    )


def steps_of(points: Sequence[OperatingPoint]) -> tuple[Array, Array]:
    """Shares and gains, ``[P, K]`` each; see :class:`Situation`."""
    width = max((len(point.steps) for point in points), default=1)
    shares, gains = np.ones((len(points), width)), np.zeros((len(points), width))
    for row, point in enumerate(points):
        steps = np.array(point.steps)
        shares[row, : len(steps)], gains[row, : len(steps)] = steps[:, 0], np.diff(steps[:, 1], prepend=0.0)
    return shares, gains
