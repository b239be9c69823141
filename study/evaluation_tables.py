"""The section of RESULTS.md of a benchmark run by ``kvferry eval``."""

from __future__ import annotations

from pathlib import Path

from kvferry.evaluate.evaluation import read
from kvferry.evaluate.evaluation_tables import PROTOCOLS, cells, heading, notes, origin, summarise
from kvferry.evaluate.plan import planned_task
from kvferry.evaluate.tables import markdown
from study.page import Places


def render(results: Path, places: Places, title: str) -> str:
    """One section of RESULTS.md from one raw file."""
    head, lines = read(results)
    task = planned_task(head["evaluation"])
    text = [f"## {title}", "", origin(head), ""]
    for protocol in PROTOCOLS:
        if not any(x.protocol == protocol for x in lines):
            continue
        rows = summarise(task, lines, protocol)
        table = markdown(heading(task, rows), [cells(row) for row in rows])
        text += [f"### {task.name}, protocol {protocol}", "", *notes(head, lines, protocol, rows), "", table, ""]
    return "\n".join(text)
