"""``python -m study long-runs``: conversations, long answers, several pictures, and what is seldom seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.console import typed


def long_runs(
    study: Annotated[
        str,
        typer.Argument(
            help="turns: ten questions about a scene in turn. drift: 200 tokens on one cache. pictures: two and three "
            "in a prompt. rare: what one training scene in a hundred shows."
        ),
    ],
    model: Annotated[str, typer.Option(help="Shipped name, folder or Hub id.")] = "testbed/cloud",
    recipe: Annotated[
        list[str] | None, typer.Option(help="Instead of the usual ones; repeatable. Ceiling and floor are added.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of the testbed's scenes.")] = "validation",
    n: Annotated[int, typer.Option(help="Scenes; of rare: questions on something rare.", min=1)] = 100,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines, continued if they are there; by default out/STUDY-MODEL.jsonl.")
    ] = None,
) -> None:
    """Measure what compression costs over long runs; `make results` makes tables of the raw results."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from study.long_runs import RECIPES, Plan
    from study.long_studies import run, studies

    plan = Plan(study, model, tuple(recipe) if recipe else RECIPES, split, n)
    out = out or Path("out") / f"{study}-{Path(model).name}.jsonl"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    total = len(list(studies()[study].jobs(plan)))
    records = run(plan, out, typed("python -m study"))
    done = sum(1 for _ in track(records, study, total=total, console=Console(stderr=True)))
    print(f"wrote {out}: {done} new records of {total}; put it into study/results/ for `make results`")
