"""Questions asked by several agents at once: a coordinator shares the link out, round by round."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kvferry.errors import InputError
from kvferry.link.trace import Array, Trace, transfer_end
from kvferry.policy.allocation import Agent, Allocator, Options
from kvferry.policy.oracle import Oracle
from kvferry.policy.simulation.scenario import BACKLOG_BYTES, Outcome, Scenario
from kvferry.policy.situation import Flags, Indices
from kvferry.policy.static import Static
from kvferry.policy.ways import Way


def run(
    scenario: Scenario, allocator: Allocator, trace: Trace, way: Way, seed: int, on_step: Callable[[int], None]
) -> Outcome:
    """All sessions of one link in step. The policy says how much rate may be counted on, the allocator who gets it.

    Slices are fixed for a round: who ends early leaves its slice unused. Static agents send their mode whatever slice
    they get. Where nothing is known of the link, everybody sends its fallback, or else its
    least point, over equal slices.
    """
    lanes, stacked, deadline = scenario.lanes, scenario.stacked, scenario.context.deadline
    table = np.arange(scenario.agents) % len(scenario.tables)
    static = _static(scenario, way)
    options = _options(scenario, static)
    rng = np.random.default_rng(seed)
    began = rng.random(lanes) * trace.period
    estimator, outcome = way.estimator(lanes), Outcome.empty(lanes)
    for step in range(scenario.episode):
        asked = began + step * scenario.every
        following = asked + scenario.every
        rate = estimator.predict()
        if isinstance(way.policy, Oracle):
            rate = 8 * (trace.offered(asked + deadline) - trace.offered(asked)) / deadline
        choice, rates = _shared_out(options, allocator, way.policy.budget(rate, estimator.ratios()), static)
        at = np.maximum(choice, 0)
        size = np.where(choice >= 0, stacked.nbytes[table, at], 0.0)
        slices = _slices(rates, size)

        ready = asked[:, None] + stacked.here[table, at]
        arrived = transfer_end(trace, ready, size, np.where(size > 0, slices, 1.0))
        by = ready + deadline - stacked.fixed[table, at] + 1e-9
        carried = np.where(size > 0, (trace.offered(by) - trace.offered(ready)) * slices, 0.0)
        carried = np.where(by < ready, -1.0, np.maximum(carried, 0.0))
        worth = np.where(choice >= 0, stacked.worth_of(table, at, carried), -np.inf)
        stopped = np.clip(np.minimum(arrived, asked[:, None] + deadline), ready, None)
        offered = (trace.offered(stopped) - trace.offered(ready)) * slices
        sent = np.where(arrived <= asked[:, None] + deadline, size, np.minimum(offered, size))
        # A slice's bytes over its share of the time: the whole link, as far as it was waited for.
        nbytes, seconds = sent.sum(1), (slices * (stopped - ready)).sum(1)

        free = stopped.max(1)
        short = size.sum(1) < scenario.probe_bytes
        wanted = np.where(short, scenario.probe_bytes - nbytes, 0.0)
        probed = np.clip(trace.offered(following) - trace.offered(free), 0.0, wanted)
        ended = np.where(probed < wanted, following, transfer_end(trace, free, probed))
        estimator.observe(
            np.where(short, probed, nbytes),
            np.where(short, ended - free, seconds),
            np.where(short, wanted, size.sum(1)) >= BACKLOG_BYTES,
        )
        modes = np.broadcast_to(stacked.modes[table, at], choice.shape)
        everybody = np.ones_like(choice, bool)
        outcome.add(modes, stacked.quality[table, at], worth, choice, everybody, nbytes + probed)
        on_step(lanes * scenario.agents)
    return outcome


def _static(scenario: Scenario, way: Way) -> Indices | None:
    """Each agent's only point under a static policy, ``[agents]``."""
    if not isinstance(way.policy, Static):
        return None
    stacked = scenario.stacked
    matches = (stacked.modes == way.policy.mode) & stacked.allowed
    if not matches.any(1).all():
        raise InputError(f"not every table has an allowed point for {way.policy.mode!r}; choose another static mode")
    found: Indices = matches.argmax(1)[np.arange(scenario.agents) % len(scenario.tables)]
    return found


def _options(scenario: Scenario, static: Indices | None) -> Options:
    """What the agents can send; under a static policy one point each, and no fallback."""
    tables = [scenario.tables[i % len(scenario.tables)] for i in range(scenario.agents)]
    options = Options.of([Agent(table.name, table.points, scenario.context) for table in tables])
    if static is None:
        return options
    only = np.arange(options.needed.shape[1]) == static[:, None]
    return Options(np.where(only, options.needed, np.inf), options.quality, options.nbytes, np.full_like(static, -1))


def _shared_out(options: Options, allocator: Allocator, budget: Array, static: Indices | None) -> tuple[Indices, Array]:
    """Points and rates, ``[lanes, agents]``."""
    known = ~np.isnan(budget)
    choice, rates = allocator.share(options, np.where(known, budget, 0.0))
    if static is not None:
        choice = np.where(rates > 0, static, choice)
    least = np.where(options.fallback >= 0, options.fallback, options.needed.argmin(1))
    unknown = least if static is None else static
    return np.where(known[:, None], choice, unknown), np.where(known[:, None], rates, 1.0)


def _slices(rates: Array, size: Array) -> Array:
    """Each agent's part of the link, among those that send: ``[lanes, agents]``."""
    sending: Flags = size > 0
    parts = np.where(sending, np.maximum(rates, np.finfo(float).tiny), 0.0)
    total = parts.sum(1, keepdims=True)
    slices: Array = np.divide(parts, total, out=np.zeros_like(parts), where=total > 0)
    return slices
