"""One decision for one question, and its reasons as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvferry.errors import DeadlineError, InputError
from kvferry.link.estimate import Forecast
from kvferry.policy.crossover import crossover
from kvferry.policy.points import OperatingPoint
from kvferry.policy.situation import Context, situation
from kvferry.policy.ways import Policy


@dataclass(frozen=True)
class Decision:
    """What was chosen, and what it was chosen from.

    Parameters
    ----------
    point : OperatingPoint
    points : tuple of OperatingPoint
    policy : Policy
    context : Context
    forecast : Forecast or None
        None where nothing was known of the link.
    """

    point: OperatingPoint
    points: tuple[OperatingPoint, ...]
    policy: Policy
    context: Context
    forecast: Forecast | None


def decide(
    policy: Policy,
    points: Sequence[OperatingPoint],
    context: Context,
    forecast: Forecast | None,
    last: OperatingPoint | None = None,
) -> Decision:
    """Choose a point.

    Parameters
    ----------
    forecast : Forecast or None
        From :func:`kvferry.link.forecast`. None, nothing known, is answered with the point that asks least of the link.
    last : OperatingPoint, optional
        What was chosen the time before; policies with hysteresis stay with it.

    Raises
    ------
    InputError
        No point is allowed.
    DeadlineError
        No allowed point could be in time, however fast the link; nothing has been computed or sent.
    """
    allowed = [point for point in points if not context.refusal(point)]
    if not allowed:
        rules = "; ".join(f"{point.mode}: {context.refusal(point)}" for point in points) or "there are none"
        raise InputError(f"no point may be used ({rules}); add one that may, such as local")
    least = min(allowed, key=context.fixed_seconds)
    now = situation(
        points,
        context,
        None if forecast is None else forecast.bits_per_second,
        None if forecast is None else forecast.ratios,
        -1 if last is None or last not in points else list(points).index(last),
    )
    if int(now.last_resort()[0]) < 0:
        raise DeadlineError(
            f"nothing can answer within {context.deadline:g} s: even {least.mode} takes "
            f"{context.fixed_seconds(least):.3g} s besides its transfer; allow more time"
        )
    return Decision(points[int(policy.choose(now)[0])], tuple(points), policy, context, forecast)


def explain(decision: Decision) -> str:
    """The reasons, one line per point, and where the choice overtakes plain ``image`` if that is in the table."""
    context, known = decision.context, decision.forecast
    link = "nothing known" if known is None else f"{known.bits_per_second / 1e6:.4g} Mbit/s foretold"
    if known is not None and known.ratios:
        low, high = min(known.ratios), max(known.ratios)
        link += f", past transfers got {low:.2f} to {high:.2f} times what was foretold"
    lines = [
        f"{decision.point.mode} by {decision.policy}, within {context.deadline:g} s; link: {link}",
        *(f"  {_reason(point, decision)}" for point in sorted(decision.points, key=lambda x: -x.quality)),
    ]
    image = next((point for point in decision.points if point.kind == "image"), None)
    if image is not None and decision.point is not image:
        barred = context.refusal(image)
        lines.append(
            f"against image it is {crossover(decision.point, image, context)}" + (f" ({barred})" if barred else "")
        )
    return "\n".join(lines)


def _reason(point: OperatingPoint, decision: Decision) -> str:
    context, known = decision.context, decision.forecast
    mark = "*" if point is decision.point else " "
    head = f"{mark} {point.mode}: quality {point.quality:g}, {point.nbytes:,} bytes, "
    if barred := context.refusal(point):
        return head + f"not allowed ({barred})"
    fixed = context.fixed_seconds(point)
    spare = context.deadline - fixed
    if spare < 0 or (spare == 0 and point.nbytes):
        return head + f"takes {fixed:.3g} s before a byte is sent, past the deadline"
    if point.anytime:
        head += f"of use from {point.anytime[0][0]:.0%} of them on, "
    needs = f"needs {8 * point.nbytes / spare / 1e6:.4g} Mbit/s" if point.nbytes else "needs no link"
    if known is None:
        return head + needs
    return head + f"{needs}, takes {fixed + 8 * point.nbytes / known.bits_per_second:.3g} s at the foretold rate"
