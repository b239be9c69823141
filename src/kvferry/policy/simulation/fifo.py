"""Questions one after another on one link: a single agent, or many that ask independently."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvferry.link.trace import Array, Trace
from kvferry.policy.simulation.scenario import BACKLOG_BYTES, Outcome, Scenario, Stacked
from kvferry.policy.situation import Indices, Situation
from kvferry.policy.ways import Way


def run(scenario: Scenario, trace: Trace, way: Way, seed: int, on_step: Callable[[int], None]) -> Outcome:
    """All sessions of one link in step: questions queue first in, first out, and are cut off at their deadline.

    A question knows how many bytes go before it, and the estimator what had been acknowledged when it is asked.
    """
    lanes, steps = scenario.lanes, scenario.episode * scenario.agents
    rng = np.random.default_rng(seed)
    began = rng.random(lanes) * trace.period
    arrivals, who = _arrivals(scenario, rng, began, steps)
    table = who % len(scenario.tables)
    all_lanes, stacked, deadline = np.arange(lanes), scenario.stacked, scenario.context.deadline
    estimator, outcome = way.estimator(lanes), Outcome.empty(lanes)
    last = np.full((lanes, scenario.agents), -1, np.int64)
    used = trace.offered(began)  # how far into what the link offers it has been spoken for
    for step in range(steps):
        asked, following, mine = arrivals[step], arrivals[step + 1], table[step]
        offered = trace.offered(asked)
        used = np.maximum(used, offered)
        worth = _worth(trace, stacked, mine, asked, used, deadline)
        now = Situation(
            modes=stacked.modes[mine],
            quality=stacked.quality[mine],
            nbytes=stacked.nbytes[mine],
            fixed=stacked.fixed[mine],
            shares=stacked.shares[mine],
            gains=stacked.gains[mine],
            allowed=stacked.allowed[mine],
            deadline=deadline,
            rate=estimator.predict(),
            ratios=estimator.ratios(),
            backlog=used - offered,
            last=last[all_lanes, who[step]],
            true_worth=worth,
        )
        choice = way.policy.choose(now)
        last[all_lanes, who[step]] = choice
        at = np.maximum(choice, 0)
        here = stacked.here[mine, at]
        size = np.where(choice >= 0, stacked.nbytes[mine, at], 0.0)

        ready = asked + here
        offered = trace.offered(ready)
        first = np.where(used > offered, trace.time_of(used), ready)  # when the first byte goes
        begin = np.maximum(used, offered)
        end = np.minimum(begin + size, np.maximum(begin, trace.offered(asked + deadline)))

        short = size < scenario.probe_bytes
        goal = np.where(short, scenario.probe_bytes, size)
        end = np.where(short, np.clip(trace.offered(following), end, np.maximum(begin + goal, end)), end)
        heard = np.minimum(following, np.where(short, following, asked + deadline))
        acknowledged = np.clip(trace.offered(heard) - begin, 0.0, end - begin)
        stopped = np.where(acknowledged >= goal, trace.time_of(begin + goal), heard)
        estimator.observe(acknowledged, np.maximum(stopped - first, 0.0), goal >= BACKLOG_BYTES)
        used = np.where(goal > 0, end, used)
        outcome.add(
            stacked.modes[mine, at][:, None],
            stacked.quality[mine, at][:, None],
            np.where(choice >= 0, worth[all_lanes, at], -np.inf)[:, None],
            choice[:, None],
            np.isfinite(worth.max(1, keepdims=True)),
            end - begin,
        )
        on_step(lanes)
    return outcome


def _arrivals(scenario: Scenario, rng: np.random.Generator, began: Array, steps: int) -> tuple[Array, Indices]:
    """When questions are asked, ``[steps + 1, lanes]``, and by which agent, ``[steps, lanes]``."""
    shape = (steps + 1, len(began))
    if scenario.arrivals == "poisson":
        gaps = rng.exponential(scenario.every / scenario.agents, shape)
        return began + np.cumsum(gaps, axis=0), rng.integers(scenario.agents, size=(steps, len(began)))
    return began + scenario.every * np.arange(steps + 1)[:, None], np.zeros((steps, len(began)), np.int64)


def _worth(trace: Trace, stacked: Stacked, mine: Indices, asked: Array, used: Array, deadline: float) -> Array:
    """What each point's answer would be worth, -inf where there would be none in time: ``[lanes, P]``."""
    ready = asked[:, None] + stacked.here[mine]
    begin = np.maximum(used[:, None], trace.offered(ready))
    by = ready + deadline - stacked.fixed[mine] + 1e-9
    carried = np.where(stacked.nbytes[mine] > 0, trace.offered(by) - begin, 0.0)
    return stacked.worth_of(mine[:, None], np.arange(by.shape[1]), np.where(by < ready, -1.0, np.maximum(carried, 0.0)))
