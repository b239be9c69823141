"""Results files of every kind, read the same way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvferry.evaluate.evaluation import Asked
from kvferry.evaluate.evaluation_tables import answers_of
from kvferry.evaluate.records import Line, Outcome
from kvferry.evaluate.tasks import Task


def as_lines(task: Task, asked: Sequence[Asked]) -> list[Line]:
    """The answers of an evaluation as a sweep's lines; what could not be asked is left out.

    A row's score stands for right and wrong. Where only all answers together have scores, as with CIDEr, they are
    taken together by protocol.
    """
    found: list[Line] = []
    for protocol in sorted({x.protocol for x in asked}):
        mine = [x for x in asked if x.protocol == protocol and x.outcomes]
        names = list(mine[0].outcomes) if mine else []
        scores = {name: answers_of(task.metric, mine, name).scores for name in names}
        for at, x in enumerate(mine):
            outcomes = {
                name: Outcome(float(scores[name][at]), reply.bytes, reply.kl, None, reply.scored)
                for name, reply in x.outcomes.items()
            }
            found.append(Line(x.index, x.kind, protocol, x.bf16_bytes, 0, x.tokens, outcomes, x.length, x.group))
    return found


def means(lines: Sequence[Line], row: str) -> float:
    """Of a row's scores."""
    return float(np.mean([x.outcomes[row].correct for x in lines]))
