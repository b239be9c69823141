"""Tables of benchmark results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvferry.errors import InputError
from kvferry.evaluate.evaluation import Asked
from kvferry.evaluate.metrics import Answers, Metric
from kvferry.evaluate.metrics.base import Floats
from kvferry.evaluate.plan import BARE, CEILING, FLOOR, planned_task
from kvferry.evaluate.records import Protocol
from kvferry.evaluate.tables import FEW, PICTURES, chose_little, few_note, interval, mean_scored
from kvferry.evaluate.tasks import Task
from kvferry.evaluate.tasks.own import OWN
from kvferry.statistics import FEWEST, TOO_FEW, Estimate, ratio_in_groups

PROTOCOLS: dict[Protocol, str] = {
    "A": "ask, then ship: pictures or text and the question are prefilled and compressed together",
    "B": "ship, then ask: pictures or text are prefilled and compressed first; what follows is fed on top",
}
ENDS = {CEILING: "ceiling", FLOOR: "floor", BARE: "floor"}


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Parameters
    ----------
    score, figures : Estimate, dict of Estimate by name
        The metric's mean score as it is shown, and what is shown beside it.
    change : Estimate or None
        Of the mean score against the ceiling, paired; in nats for perplexity. None for the ceiling itself.
    kl, agree : Estimate
        See :class:`kvferry.evaluate.evaluation.Reply`.
    bytes : float
        Mean.
    ratio : float
        Of the full cache in BF16 to that; infinite where nothing crosses.
    scored : float or None
        As in :class:`kvferry.evaluate.tables.Row`.
    """

    name: str
    score: Estimate
    figures: dict[str, Estimate]
    change: Estimate | None
    kl: Estimate
    agree: Estimate
    bytes: float
    ratio: float
    scored: float | None = None

    @property
    def end(self) -> str:
        """Whether this is the ceiling or the floor."""
        return ENDS.get(self.name, "")

    @property
    def verdict(self) -> str:
        """What may be said of the difference to the ceiling."""
        if self.change is None:
            return ""
        if self.change.n < FEWEST:
            return TOO_FEW
        if self.change.low <= 0 <= self.change.high:
            return "no difference shown"
        return "lower" if self.change.mean < 0 else "higher"


def summarise(task: Task, lines: Sequence[Asked], protocol: Protocol) -> list[Row]:
    """All rows of one protocol over the questions that could be asked, which are the same for every row."""
    mine = sorted((x for x in lines if x.protocol == protocol), key=lambda x: x.index)
    asked = [x for x in mine if x.outcomes]
    if not asked:
        why = f"; the first was refused: {mine[0].refused}" if mine else ""
        raise InputError(f"the results hold no answers under protocol {protocol}{why}")
    metric, groups = task.metric, [x.group for x in asked]
    names = list(asked[0].outcomes)
    answers = {name: answers_of(metric, asked, name) for name in names}
    full = answers[CEILING].scores
    bf16 = float(np.mean([x.bf16_bytes for x in asked]))
    ones = np.ones(len(asked))
    rows = []
    for name in names:
        mean = ratio_in_groups(answers[name].scores, ones, groups)
        change = None if name == CEILING else ratio_in_groups(answers[name].scores - full, ones, groups)
        size = float(np.mean([x.outcomes[name].bytes for x in asked]))
        rows.append(
            Row(
                name=name,
                score=_shown(metric, mean),
                figures={x.name: ratio_in_groups(x.over, x.under, groups) for x in metric.figures(answers[name])},
                change=change,
                kl=ratio_in_groups([x.outcomes[name].kl for x in asked], ones, groups),
                agree=ratio_in_groups([x.outcomes[name].agree for x in asked], ones, groups),
                bytes=size,
                ratio=bf16 / size if size else float("inf"),
                scored=mean_scored([x.outcomes[name].scored for x in asked]),
            )
        )
    return sorted(rows, key=lambda row: {"ceiling": 0, "floor": 2}.get(row.end, 1))


def answers_of(metric: Metric, asked: Sequence[Asked], name: str) -> Answers:
    """What one row said, with the metric's scores."""
    replies = [x.outcomes[name] for x in asked]
    given = [np.nan if reply.score is None else reply.score for reply in replies]
    answers = Answers(
        [reply.said for reply in replies], [x.references for x in asked], [x.group for x in asked], np.array(given)
    )
    scores: Floats = metric.scores(answers)
    return replace(answers, scores=scores)


def _shown(metric: Metric, mean: Estimate) -> Estimate:
    return Estimate(metric.shown(mean.mean), metric.shown(mean.low), metric.shown(mean.high), mean.n)


def heading(task: Task, rows: Sequence[Row]) -> list[str]:
    """Names of a table's columns."""
    unit = "" if task.metric.higher_is_better else " in nats"
    return [
        "recipe", f"{task.metric.name} [95 %]", *rows[0].figures, f"to full{unit} [95 %]", "", "KL", "top-1",
        "bytes", "x smaller",
    ]  # fmt: skip


def cells(row: Row) -> list[str]:
    """The texts of one row, below :func:`heading`."""
    mark = f" {FEW}" if chose_little(row.scored) else ""
    return [
        f"{row.name} ({row.end})" if row.end else row.name + mark,
        interval(row.score),
        *(f"{x.mean:.3f}" for x in row.figures.values()),
        "" if row.change is None else interval(row.change),
        row.verdict,
        f"{row.kl.mean:.4f}",
        f"{row.agree.mean:.3f}",
        f"{row.bytes:,.0f}",
        "" if row.ratio == float("inf") else f"{row.ratio:.1f}",
    ]


def notes(head: dict[str, Any], lines: Sequence[Asked], protocol: Protocol, rows: Sequence[Row]) -> list[str]:
    """What a reader must know about a table: the protocol, how many questions, what the columns mean."""
    plan = head["evaluation"]
    task = planned_task(plan)
    mine = [x for x in lines if x.protocol == protocol]
    refused = [x for x in mine if x.refused]
    groups = {x.group for x in mine if x.group}
    drawn = f"; intervals draw the {len(groups)} pictures or texts they are on" if len(groups) > 1 else ""
    if len(groups) == 1 and len(mine) > 1:
        drawn = ", all on one picture or text: what intervals say holds for questions on that one only"
    text = [
        f"Protocol {protocol}, {PROTOCOLS[protocol]}. n = {rows[0].score.n} questions, the same for every row{drawn}.",
        "KL (nats a token) and top-1 agreement hold next-token distributions against the full cache's, along its "
        f"{'own answer' if task.metric.higher_is_better else 'text'}. "
        "Bytes are means of whole bitstreams; the ratio is to the full cache in BF16.",
    ]
    if task.name == OWN:
        told = f' told "{plan["instruction"]}",' if plan["instruction"] else ""
        text.append(
            f"Answers are judged by `{plan['metric'] or 'exact'}`,{told} of at most {task.max_new_tokens} tokens."
        )
    if task.agreement:
        text.append("The file holds no answers: what counts is the full cache's own, so its score is 1 by itself.")
    if any(row.name.startswith(PICTURES) for row in rows):
        text.append("`image` and `embeds` rows send the pictures as JPEG, or their embeddings, by themselves.")
    if any(row.name == BARE for row in rows):
        text.append(f"`{BARE}` is the question without its context.")
    if any(row.name.endswith("oracle") for row in rows):
        text.append(
            f'*proxy* rows are scored with the fixed question "{task.proxy}"; *oracle* rows with the question that '
            "comes later, which no deployment can do."
        )
    text += filter(None, few_note([row.scored for row in rows]))
    if refused:
        text.append(f"{len(refused)} questions could not be asked; the first: {refused[0].refused}.")
    return text


def origin(head: dict[str, Any]) -> str:
    """Model, data, command, commit, versions and machine."""
    plan, hub = head["evaluation"], head["hub"]
    split = "" if plan["task"] == OWN else f", split `{plan['split'] or (hub[2] if hub else 'validation')}`"
    data = f"`{plan['data']}`" if plan["data"] else f"`{hub[0]}` ({hub[1] or 'default'})" if hub else "drawn scenes"
    return (
        f"Model `{plan['model']}` (fingerprint `{head['fingerprint'][:12]}`, {head['dtype']}), data {data}{split}. "
        f"Made by `{head['command']}` at commit "
        f"`{head['commit'][:12]}{'+changes' if head['commit'].endswith('+changes') else ''}`, torch {head['torch']}, "
        f"transformers {head['transformers']}, {head['machine']}."
    )
