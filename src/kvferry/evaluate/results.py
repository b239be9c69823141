"""Results files of every kind, read the same way: of ``kvferry sweep`` and ``eval``, on drawn scenes, benchmarks or
questions of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvferry.errors import InputError
from kvferry.evaluate import evaluation
from kvferry.evaluate.evaluation import Asked
from kvferry.evaluate.evaluation_tables import answers_of
from kvferry.evaluate.metrics import Metric
from kvferry.evaluate.plan import planned_task
from kvferry.evaluate.records import Line, Outcome, Protocol, kind_of, read
from kvferry.evaluate.tasks import Task
from kvferry.evaluate.tasks.own import OWN

SHIPPED = ("testbed/edge", "testbed/cloud", "testbed/control")
"""Models that come with the project, small and trained on drawn scenes."""
OTHER = {"plan": "a long run of `python -m study`", "scout": "`make results` on mode scout"}
"""Results that have tables of their own, in RESULTS.md, by the key that their first line begins with."""


@dataclass(frozen=True)
class Results:
    """One file.

    Parameters
    ----------
    head : dict
        Its first line: what was run, and where.
    lines : list of Line
        Questions that could be asked; scores are 0 or 1, or a metric's.
    score : str
        What the scores are called.
    metric : Metric or None
        None where they are right and wrong.
    questions : dict of int to str
        What tells a question from another one, by its index.
    texts : dict
        What was said, by index, protocol and row; empty of a sweep, which keeps none.
    """

    path: Path
    head: dict[str, Any]
    lines: list[Line]
    score: str
    metric: Metric | None
    questions: dict[int, str]
    texts: dict[tuple[int, Protocol, str], str]

    @property
    def plan(self) -> dict[str, Any]:
        """What was run."""
        plan: dict[str, Any] = self.head.get("sweep") or self.head["evaluation"]
        return plan

    @property
    def higher_is_better(self) -> bool:
        """Whether a higher score is."""
        return self.metric is None or self.metric.higher_is_better

    def shown(self, score: float) -> float:
        """The figure that a mean score stands for."""
        return score if self.metric is None else self.metric.shown(score)

    @property
    def protocols(self) -> list[Protocol]:
        """Those that it holds."""
        return sorted({x.protocol for x in self.lines})

    @property
    def asked(self) -> str:
        """Where the questions are from, for people."""
        plan = self.plan
        if "sweep" in self.head or plan["task"] == "testbed":
            return f"drawn scenes, split {plan['split'] or 'validation'}"
        if plan["task"] == OWN:
            return Path(plan["data"]).name
        hub = self.head.get("hub") or ["", "", ""]
        where = Path(plan["data"]).name if plan["data"] else hub[0]
        return f"{plan['task']} ({where}, split {plan['split'] or hub[2]})"

    @property
    def model(self) -> str:
        """What is known of the model, for people."""
        head = self.head
        size = f", {head['parameters'] / 1e6:,.0f} M parameters" if head.get("parameters") else ""
        kind = f", {head['architecture']}" if head.get("architecture") else ""
        mark = f", fingerprint {str(head['fingerprint'])[:12]}" if head.get("fingerprint") else ""
        name = head.get("model") or self.plan["model"]
        return f"{name} ({head.get('dtype', 'dtype unknown')!s}{kind}{size}{mark})"

    @property
    def ships(self) -> bool:
        """Whether the model is one that comes with the project."""
        return self.plan["model"] in SHIPPED


def read_results(path: Path) -> Results:
    """Any results file.

    Raises
    ------
    InputError
        It holds something else, or no question yet.
    """
    if not path.is_file():
        raise InputError(f"no results at {path}; `kvferry sweep --out {path}` makes them")
    kind = kind_of(path)
    if not kind:
        raise InputError(f"{path} holds no results of `kvferry sweep` or `kvferry eval`{_what_else(path)}")
    found = _swept(path) if kind == "sweep" else _evaluated(path)
    if not found.lines:
        raise InputError(f"{path} holds no answer yet; run its command again, it goes on where it stopped")
    return found


def _what_else(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            head = json.loads(file.readline())
        first = next(iter(head))
    except (ValueError, TypeError, StopIteration, OSError):
        return ""
    return f" but of {OTHER[first]}, whose tables RESULTS.md has" if first in OTHER else ""


def _swept(path: Path) -> Results:
    head, lines = read(path)
    plan = head["sweep"]
    kinds = ",".join(plan.get("kinds", []))
    names = {x.index: f"{plan['split']} {kinds} {x.index} {x.kind}" for x in lines}
    return Results(path, head, lines, "accuracy", None, names, {})


def _evaluated(path: Path) -> Results:
    head, asked = evaluation.read(path)
    task = planned_task(head["evaluation"])
    told = {x.index: x.key or repr((x.kind, x.group, x.references)) for x in asked}
    said = {(x.index, x.protocol, row): reply.said for x in asked for row, reply in x.outcomes.items()}
    score = "agreement with the full cache" if task.agreement else task.metric.name
    return Results(path, head, as_lines(task, asked), score, task.metric, told, said)


def as_lines(task: Task, asked: Sequence[Asked]) -> list[Line]:
    """The answers of an evaluation as a sweep's lines; what could not be asked is left out.

    A row's score stands for right and wrong. Where only all answers together have scores, as with CIDEr, they are
    taken together by protocol.
    """
    found: list[Line] = []
    for protocol in sorted({x.protocol for x in asked}):
        mine = [x for x in asked if x.protocol == protocol and x.outcomes]
        names = list(mine[0].outcomes) if mine else []
        mine = [x for x in mine if list(x.outcomes) == names]
        scores = {name: answers_of(task.metric, mine, name).scores for name in names}
        for at, x in enumerate(mine):
            outcomes = {
                name: Outcome(float(scores[name][at]), reply.bytes, reply.kl, None, reply.scored)
                for name, reply in x.outcomes.items()
            }
            found.append(Line(x.index, x.kind, protocol, x.bf16_bytes, 0, x.tokens, outcomes, x.length, x.group))
    return found


def judged(scores: Sequence[float]) -> bool:
    """Whether scores are right and wrong, and nothing between."""
    return bool(np.isin(scores, (0, 1)).all())
