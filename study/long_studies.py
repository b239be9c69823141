"""The long runs by name, and how one is run into a raw file that can be continued."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvferry.evaluate.sweep import provenance
from study import long_drift, long_pictures, long_rare, long_turns, prune
from study.long_runs import Plan, Record, read
from study.raw import held

if TYPE_CHECKING:
    from kvferry.models import VLM


@dataclass(frozen=True)
class Study:
    """Which indices a plan needs, and what one of them comes to."""

    jobs: Callable[[Plan], Iterable[int]]
    run: Callable[[VLM, Plan, int], Record]
    dtype: str = "auto"


def studies() -> dict[str, Study]:
    """By the word that ``python -m study long-runs`` and the names of raw files begin with."""

    def first(plan: Plan) -> range:
        return range(plan.n)

    return {
        "turns": Study(first, long_turns.run),
        "drift": Study(first, long_drift.run),
        "pictures": Study(first, long_pictures.run),
        "rare": Study(long_rare.indices, long_rare.run),
        "prune": Study(first, prune.run, "float32"),
    }


def _indices(path: Path) -> tuple[dict[str, Any], Iterator[int]]:
    head, records = read(path)
    return head, (record["index"] for record in records)


def run(plan: Plan, out: Path, command: str = "") -> Iterator[Record]:
    """Run what ``out`` does not hold yet, append it record by record, yield each as it comes.

    Raises
    ------
    InputError
        ``out`` holds the results of another plan or of another model.
    """
    from kvferry.models import load

    study = studies()[plan.study]
    vlm = load(plan.model, dtype=study.dtype)
    head = {"plan": json.loads(json.dumps(asdict(plan))), "command": command, **provenance(vlm)}

    def same(before: dict[str, Any]) -> bool:
        return (before["plan"] | {"n": plan.n}, before["fingerprint"]) == (head["plan"], head["fingerprint"])

    done = held(out, head, _indices, same, "plan")
    with out.open("a") as file:
        for index in study.jobs(plan):
            if index not in done:
                record = {"index": index, **study.run(vlm, plan, index)}
                file.write(json.dumps(record, separators=(",", ":")) + "\n")
                file.flush()
                yield record
