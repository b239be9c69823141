"""Chooses a mode for every question: from measured points, what the link has shown, and how busy the cloud is."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import grpc

from kvferry.edge.membership import Share
from kvferry.errors import DeadlineError, InputError, KVFerryError, LinkError
from kvferry.link import Forecast, forecast
from kvferry.link.estimate import LEAST
from kvferry.modes import Holdings, LocalMode, Question, parse_mode
from kvferry.policy import Context, Decision, Greedy, OperatingPoint, PointTable, Way, decide
from kvferry.policy.situation import broken_rule
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from kvferry.models import VLM

PROBE_BYTES = 2048
PROBES = 10
"""The first time; nine errors of a forecast are the fewest that bound a chance of 0.1."""
STALE_SECONDS = 10.0
"""After so long without news of the link, the next question sends one probe."""
LOOK_SHARE = 0.25
"""Of a question's time that asking the cloud how it is may take."""
LEAST_PART = 0.1
"""What a probe takes beyond a round trip cannot be told from noise below this part of the whole."""
ROUND_TRIPS = 8

Describe = Callable[[pb.DescribeRequest, float], "grpc.Future[pb.DescribeReply]"]
"""Begins such a call, which may take so many seconds."""


@dataclass(frozen=True)
class Asked:
    """One question, and what it may be answered with."""

    question: Question
    vlm: VLM | None
    holdings: Holdings
    privacy: frozenset[str]


class Pilot:
    """What one edge knows of its link and its cloud.

    Before each choice the cloud is asked how long its queue is, which also measures the round trip. Before anything is
    known of the link's rate, ten probes of 2 KiB follow each other; where nothing has been heard of it for ten seconds,
    one. A probe that is not back within a quarter of the question's time counts as if it had just come.
    """

    def __init__(self, table: PointTable, way: Way, translate: Callable[[grpc.RpcError, float], KVFerryError]) -> None:
        self.table = table
        self._way = way
        self._translate = translate
        self._estimator = way.estimator(1)
        self._heard_at = float("-inf")
        self._round_trips: deque[float] = deque(maxlen=ROUND_TRIPS)
        self._queue_seconds = 0.0
        self._last: OperatingPoint | None = None

    @property
    def rtt_seconds(self) -> float:
        """The shortest of the last round trips; 0 before the first."""
        return min(self._round_trips, default=0.0)

    @property
    def bits_per_second(self) -> float:
        """What the link is expected to carry; 0 before anything is known of it."""
        known = forecast(self._estimator)
        return 0.0 if known is None else known.bits_per_second

    def learn(self, nbytes: int, seconds: float) -> None:
        """Take in one backlogged transfer."""
        self._estimator.observe(nbytes, seconds)
        self._heard_at = time.perf_counter()

    def usable(self, vlm: VLM | None, privacy: frozenset[str]) -> list[OperatingPoint]:
        """The points that any question may be answered with, nothing held by the cloud.

        Raises
        ------
        InputError
            There is none.
        """
        nothing = Context(1.0, privacy=privacy)
        found = []
        for point in self.table.points:
            mode = parse_mode(point.mode)
            whole = replace(point, needs=tuple(sorted({*point.needs, *mode.LEAVES})))
            if (vlm is not None or not mode.needs_model) and not nothing.refusal(whole):
                found.append(point)
        if not found:
            raise InputError(f"none of the points {self.table.name} may be used here; add one that may, such as local")
        return found

    def choose(
        self, asked: Asked, describe: Describe, began: float, seconds: float, share: Share | None = None
    ) -> tuple[Decision, str]:
        """The decision, and why the cloud cannot be asked if it cannot.

        Parameters
        ----------
        share : Share, optional
            What a coordinator grants: it takes the place of the forecast, and ``greedy`` that of the policy.

        Raises
        ------
        InputError
            No point may be used.
        DeadlineError
            None can be in time, or none at the rate of ``share``; nothing has been computed.
        LinkError
            The cloud is away and there is no point for ``local``.
        """
        points = [self._here(point, asked) for point in self.table.points]
        points = [x for x in points if asked.vlm is not None or not parse_mode(x.mode).needs_model]
        allowed = Context(seconds, privacy=asked.privacy)
        if all(point.is_local for point in points if not allowed.refusal(point)):
            return decide(self._way.policy, points, allowed, forecast(self._estimator)), ""
        try:
            self._look(describe, LOOK_SHARE * seconds, probe=share is None)
        except DeadlineError:
            pass  # late, and so counted; what was known before is still the best guess
        except LinkError as error:
            here = [point for point in points if point.is_local]
            if not here:
                raise
            left = _left(began, seconds)
            return decide(Greedy(), here, Context(left), None), str(error)
        context = Context(_left(began, seconds), self.rtt_seconds, self._queue_seconds, privacy=asked.privacy)
        if share is not None:
            return _within(share, points, context), ""
        decision = decide(self._way.policy, points, context, forecast(self._estimator), self._last)
        self._last = decision.point
        return decision, ""

    def _here(self, point: OperatingPoint, asked: Asked) -> OperatingPoint:
        """The point with everything its mode lets out, whatever the table says, and without what is there already."""
        mode = parse_mode(point.mode)
        needs = set(point.needs) | set(mode.LEAVES)
        if "held_picture" in needs and not isinstance(mode, LocalMode) and asked.holdings.session:
            usable = asked.vlm is not None or not mode.needs_model
            if usable and not broken_rule(mode.LEAVES, asked.privacy):
                items = mode.sender(asked.vlm, asked.question, asked.holdings).start().items
                if items and all(item.handle for item in items):
                    needs.remove("held_picture")
        return replace(point, needs=tuple(sorted(needs)))

    def _look(self, describe: Describe, seconds: float, probe: bool) -> None:
        until = time.perf_counter() + seconds
        for _ in range(1 if self._round_trips else 2):  # the very first one includes setting up the connection
            began = time.perf_counter()
            try:
                reply = describe(pb.DescribeRequest(), until - began).result()
            except grpc.RpcError as error:
                self._round_trips.append(time.perf_counter() - began)
                raise self._translate(error, seconds) from None
            self._round_trips.append(time.perf_counter() - began)
            self._queue_seconds = reply.queue_seconds
        if not probe:
            return
        if forecast(self._estimator) is None:
            self._probe(PROBES, describe, until)
        elif time.perf_counter() - self._heard_at > STALE_SECONDS:
            self._probe(1, describe, until)

    def _probe(self, count: int, describe: Describe, until: float) -> None:
        """Send ``count`` fillers in a row; each that comes back says how fast all so far have been."""
        began = time.perf_counter()
        filler = pb.DescribeRequest(filler=bytes(PROBE_BYTES))
        calls = [describe(filler, until - began) for _ in range(count)]
        for number, call in enumerate(calls, 1):
            late = False
            try:
                call.result()
            except grpc.RpcError:
                late = True
            took = time.perf_counter() - began
            self.learn(number * PROBE_BYTES, max(took - self.rtt_seconds, LEAST_PART * took))
            if late:
                break
        for call in calls:
            call.cancel()


def _within(share: Share, points: Sequence[OperatingPoint], context: Context) -> Decision:
    """The best point that fits into a share with the margin that it was shared out with, else what asks least.

    Nothing is sent where not even that fits.
    """
    rate = max(share.bits_per_second, LEAST)
    decision = decide(Greedy(), points, context, Forecast(rate))
    if context.fixed_seconds(decision.point) + 8 * decision.point.nbytes / rate > context.deadline * (1 + 1e-9):
        raise DeadlineError(
            f"nothing can answer within {context.deadline:.3g} s at the {rate / 1e6:.4g} Mbit/s that the coordinator "
            f"grants ({share.members} agents); allow more time, or add a point that sends less, such as scout or local"
        )
    return decision


def latest_start(decision: Decision, seconds: float) -> float | None:
    """Seconds after the question at which the cloud must begin to answer from what it has; None where that is past."""
    point, context = decision.point, decision.context
    after = context.fixed_seconds(point) - point.edge_seconds - point.compress_seconds
    return seconds - after if after < seconds else None


def _left(began: float, seconds: float) -> float:
    left = seconds - (time.perf_counter() - began)
    if left <= 0:
        raise DeadlineError(f"{seconds:g} s were over before a mode was chosen; allow more time")
    return left
