"""``python -m study squad``: SQuAD paragraphs as rows of ``kvferry eval --task squad_v2``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def squad(
    paragraphs: Annotated[Path, typer.Argument(help="JSON lines: context, questions with question and answers.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write.")] = Path("out/squad-test.jsonl"),
) -> None:
    """Write the first question of every paragraph, with the columns that the task reads."""
    rows = [json.loads(line) for line in paragraphs.read_text().splitlines()]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w") as file:
        for row in rows:
            asked = row["questions"][0]
            told = {"context": row["context"], "question": asked["question"], "answers": {"text": asked["answers"]}}
            file.write(json.dumps(told) + "\n")
    print(f"wrote {out}: {len(rows)} questions")
