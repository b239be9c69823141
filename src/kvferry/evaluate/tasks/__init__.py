"""Benchmarks by name, one per file."""

from kvferry.errors import InputError
from kvferry.evaluate.tasks.base import Example, Hub, Row, Task
from kvferry.evaluate.tasks.chartqa import ChartQA
from kvferry.evaluate.tasks.coco import COCO
from kvferry.evaluate.tasks.docvqa import DocVQA
from kvferry.evaluate.tasks.hotpotqa import HotpotQA
from kvferry.evaluate.tasks.infovqa import InfoVQA
from kvferry.evaluate.tasks.mme import MME
from kvferry.evaluate.tasks.pope import POPE
from kvferry.evaluate.tasks.squad import SQuAD2
from kvferry.evaluate.tasks.testbed import Testbed
from kvferry.evaluate.tasks.textvqa import TextVQA
from kvferry.evaluate.tasks.triviaqa import TriviaQA
from kvferry.evaluate.tasks.vqav2 import VQAv2
from kvferry.evaluate.tasks.wikitext import WikiText
from kvferry.plugins import Registry

_OWN = (
    Testbed, VQAv2, DocVQA, InfoVQA, ChartQA, TextVQA, MME, POPE, COCO, SQuAD2, TriviaQA, HotpotQA, WikiText,
)  # fmt: skip

TASKS: Registry[type[Task]] = Registry("tasks", {task.name: task for task in _OWN})


def task_of(name: str) -> Task:
    """The task of this name, with its usual numbers.

    Raises
    ------
    InputError
        There is none.
    """
    try:
        return TASKS.find(name)()
    except KeyError:
        raise InputError(f"there is no task {name!r}; choose one of {', '.join(TASKS.names())}") from None


__all__ = ["TASKS", "Example", "Hub", "Row", "Task", "task_of"]
