"""``python -m study prune``: visual tokens dropped inside prefill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.console import typed


def prune(
    model: Annotated[str, typer.Option(help="Shipped name, folder or Hub id.")] = "testbed/cloud",
    split: Annotated[str, typer.Option(help="Of the testbed's scenes.")] = "validation",
    n: Annotated[int, typer.Option(help="Questions.", min=1)] = 400,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines, continued if they are there; by default out/prune-MODEL.jsonl.")
    ] = None,
) -> None:
    """Dropping inside prefill against dropping after it; `make results` makes a page of the raw results."""
    import torch
    from rich.console import Console
    from rich.progress import track

    from study.long_runs import Plan
    from study.long_studies import run

    out = out or Path("out") / f"prune-{Path(model).name}.jsonl"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    records = run(Plan("prune", model, (), split, n), out, typed("python -m study"))
    done = sum(1 for _ in track(records, "prune", total=n, console=Console(stderr=True)))
    print(f"wrote {out}: {done} new records of {n}; put it into study/results/ for `make results`")
