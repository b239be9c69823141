"""Trace-driven simulation: what a policy would have done on a link, a million questions a minute and more."""

from __future__ import annotations

from collections.abc import Callable

from kvferry.policy.allocation import ALLOCATORS
from kvferry.policy.simulation import fifo, rounds
from kvferry.policy.simulation.scenario import Outcome, Scenario
from kvferry.policy.ways import Way

__all__ = ["Outcome", "Scenario", "simulate"]


def simulate(
    scenario: Scenario, way: Way, allocation: str = "quality", on_step: Callable[[int], None] = lambda requests: None
) -> Outcome:
    """Run one way through a scenario. The same scenario gives every way the same questions at the same times.

    Parameters
    ----------
    allocation : str
        Key of ``ALLOCATORS``; used where several agents ask in sync.
    on_step : callable
        Told how many requests have just been simulated.

    Raises
    ------
    InputError
        A static mode has no allowed point, or a policy cannot work with its estimator.
    """
    parts = []
    for number, trace in enumerate(scenario.traces):
        seed = scenario.seed + 1_000_003 * number
        if scenario.in_rounds:
            parts.append(rounds.run(scenario, ALLOCATORS[allocation], trace, way, seed, on_step))
        else:
            parts.append(fifo.run(scenario, trace, way, seed, on_step))
    return Outcome.joined(parts)
