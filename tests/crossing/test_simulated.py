"""The simulator and two processes on the same link: the same questions are in time, and the same are late."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from kvferry import VLM, DeadlineError, Edge
from kvferry.link import RateTrace, Replay, ShapedLink
from kvferry.policy import Context, OperatingPoint, PointTable, Way
from kvferry.policy.simulation import Scenario, simulate
from tests.crossing.process import CloudProcess

QUESTION = "what colour is the circle?"
MODE = "kv:full|int4"
DEADLINE, EVERY = 3.0, 7.0
FAST, SLOW = 400e3, 40e3
SECONDS = (FAST,) * 6 + (SLOW,) * 8 + (FAST,) * 7 + (SLOW,) * 7
"""Questions come at 0, 7, 14 and 21 s; one of them takes 0.6 s on the fast link, 6 s on the slow one."""


class Watched(Replay):
    """A trace that says when it began, by the relay's clock."""

    began = float("nan")

    def departure(self, nbytes: int, arrived: float) -> float:
        if np.isnan(self.began):
            self.began = arrived
        return super().departure(nbytes, arrived)


def simulated(nbytes: int, count: int) -> list[bool]:
    """Which of the first ``count`` questions are in time; a lane of the simulator begins where its seed says."""
    scenario = scenario_of(nbytes, count)
    began = np.random.default_rng(scenario.seed).random(scenario.lanes)[0] * len(SECONDS)
    trace = RateTrace(np.roll(np.repeat(SECONDS, 100), round(100 * began)), 0.01)
    sums = []
    for episode in range(1, count + 1):
        outcome = simulate(scenario_of(nbytes, episode, trace), Way.parse(f"static:{MODE}"))
        sums.append(int(outcome.on_time[0]))
    return np.diff(sums, prepend=0).astype(bool).tolist()


def scenario_of(nbytes: int, episode: int, trace: RateTrace | None = None) -> Scenario:
    trace = trace or RateTrace(np.array(SECONDS), 1.0)
    table = PointTable("one", (OperatingPoint(MODE, 1.0, nbytes, 0.05, 0.05, 0.05, 0.05),))
    return Scenario((table,), (trace,), Context(DEADLINE), every=EVERY, requests=episode, episode=episode)


def test_the_simulator_and_two_processes_agree(cloud: CloudProcess, vlm: VLM, picture: Path) -> None:
    shaper = Watched(RateTrace(np.array(SECONDS), 1.0))
    with Edge(vlm, cloud.address) as edge:
        warm = edge.ask([picture], QUESTION, mode=MODE)
    live: list[bool] = []
    late_by: list[float] = []
    with ShapedLink(cloud.address, uplink=shaper) as link, Edge(vlm, link.address, deadline=DEADLINE) as edge:
        for number in range(4):
            if number:
                time.sleep(max(shaper.began + number * EVERY - time.monotonic(), 0.0))
            began = time.monotonic()
            try:
                answer = edge.ask([picture], QUESTION, mode=MODE)
            except DeadlineError:
                live.append(False)
            else:
                live.append(True)
                asked = began - shaper.began
                carried = shaper.trace.time_of(shaper.trace.offered(asked) + answer.bitstream_bytes) - asked
                late_by.append(answer.seconds.send / float(carried))
    assert live == simulated(warm.payload_bytes_up, 4) == [True, False, True, False]
    assert late_by == pytest.approx([1.0] * len(late_by), rel=0.35), "of the trace's own time for so many bytes"
