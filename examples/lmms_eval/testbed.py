"""What lmms-eval asks of a task, for the testbed's questions; a row holds the index of its scene."""

from __future__ import annotations

from typing import Any

from kvferry.testbed import exact_match, sample


def pictures(row: dict[str, Any]) -> list[Any]:
    """Draw the scene."""
    return list(sample("validation", row["index"]).images)


def question(row: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """As it stands in the row."""
    return str(row["question"])


def judge(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for the right answer."""
    return {"exact_match": float(exact_match(results[0], row["answer"]))}
