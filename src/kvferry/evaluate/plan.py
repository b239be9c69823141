"""What an evaluation runs, and the task that follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kvferry.codecs import parse_codec
from kvferry.errors import InputError
from kvferry.evaluate.records import Protocol
from kvferry.evaluate.tasks import Task, task_of
from kvferry.evaluate.tasks.own import OWN, own_questions, own_task
from kvferry.recipe import Recipe

CEILING, FLOOR = "full|bf16", "none|bf16"
"""Always among the rows; without pictures the floor is :data:`BARE`."""
BARE = "prompt"
"""The row of the question by itself, without its context: its words alone cross. Bytes are theirs in UTF-8."""
FIXED = (
    "model", "task", "recipes", "data", "split", "dtype", "images", "metric", "instruction", "max_new_tokens", "jpeg",
    "embeds",
)  # fmt: skip
"""In these a continued evaluation must agree."""
ABSENT: dict[str, Any] = {
    "images": "", "metric": "", "instruction": "", "max_new_tokens": 0, "jpeg": [], "embeds": [], "visual": True,
    "answered": True,
}  # fmt: skip
"""What older files do not name."""


@dataclass(frozen=True)
class Evaluation:
    """What to run.

    Parameters
    ----------
    model : str
        Anything ``kvferry.load`` takes.
    task : str
        One of :data:`kvferry.evaluate.tasks.TASKS`, or ``own``: the questions of ``data`` (:mod:`kvferry.data`).
    recipes : tuple of str
        Ceiling and floor are added. Where a policy must keep more of a prompt than a recipe's fraction, the smallest
        that works is taken there; the bytes are those.
    protocols : tuple of {"A", "B"}
        Empty for all that the task has.
    data, split : str
        Where the rows are; empty for the Hub, and for the task's own split.
    n, start : int
        Which rows, in the data set's order. Of one's own, ``n`` becomes how many there are.
    device, dtype : str
        Of the model; see :func:`kvferry.load`. Empty for the CPU.
    images, metric, instruction : str
        Of one's own questions: the folder of the pictures, one of :data:`kvferry.evaluate.metrics.METRICS`, and a
        line below every question. Empty for the file's folder, ``exact`` and none.
    max_new_tokens : int
        Of an answer; 0 for the task's own.
    jpeg, embeds : tuple
        Qualities and codecs in which the pictures and their embeddings are sent too, as in
        :class:`kvferry.evaluate.sweep.Sweep`; under protocol A only.
    visual, answered : bool
        Set for one's own questions: whether they have pictures, and answers. Without answers, the full cache's count.
    """

    model: str
    task: str
    recipes: tuple[str, ...] = ()
    protocols: tuple[Protocol, ...] = ()
    data: str = ""
    split: str = ""
    n: int = 1000
    start: int = 0
    device: str = ""
    dtype: str = "auto"
    images: str = ""
    metric: str = ""
    instruction: str = ""
    max_new_tokens: int = 0
    jpeg: tuple[int, ...] = ()
    embeds: tuple[str, ...] = ()
    visual: bool = True
    answered: bool = True

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError("an evaluation needs at least one question (--n)")
        if self.task == OWN:
            self._look()
        else:
            for option in ("images", "metric", "instruction"):
                if getattr(self, option):
                    raise InputError(f"--{option} is for questions of your own: give --data without --task")
        task = planned_task(vars(self))
        wanted = self.protocols or task.protocols
        missing = [p for p in wanted if p not in task.protocols]
        if missing:
            raise InputError(f"{self.task} has no protocol {missing[0]}, only {', '.join(task.protocols)}")
        if (self.jpeg or self.embeds) and not task.visual:
            raise InputError("there are no pictures to send; leave --jpeg and --embeds out")
        if any(not 1 <= quality <= 100 for quality in self.jpeg):
            raise InputError(f"--jpeg takes qualities from 1 to 100, not {', '.join(map(str, self.jpeg))}")
        for codec in self.embeds:
            parse_codec(codec)
        named = [str(Recipe.parse(r)) for r in self.recipes]
        ends = [CEILING, FLOOR] if task.visual else [CEILING]
        object.__setattr__(self, "protocols", tuple(wanted))
        object.__setattr__(self, "recipes", tuple(dict.fromkeys([*ends, *named])))

    def _look(self) -> None:
        """See what the questions have."""
        if not self.data:
            raise InputError("name the file of your questions with --data, or a benchmark with --task")
        if self.split:
            raise InputError("--split is for benchmarks; your questions are all in one file")
        found, visual, answered = own_questions(
            self.data, self.images, self.n, self.start, self.instruction, self.metric
        )
        for name, value in (("n", found.total), ("visual", visual), ("answered", answered)):
            object.__setattr__(self, name, value)


def planned_task(plan: Mapping[str, Any]) -> Task:
    """The task of a plan, as it is or as a results file holds it."""
    plan = ABSENT | dict(plan)
    task = own_task(plan) if plan["task"] == OWN else task_of(plan["task"])
    return replace(task, max_new_tokens=plan["max_new_tokens"]) if plan["max_new_tokens"] else task
