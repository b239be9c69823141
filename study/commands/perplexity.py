"""``python -m study perplexity``: what SmolLM2 foretells behind a compressed cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from study.squad import DATA


def perplexity(
    data: Annotated[Path, typer.Option(help="Folder of test.jsonl.")] = DATA,
    n: Annotated[int, typer.Option(help="Windows that the file shall hold.", min=1)] = 60,
    model: Annotated[str, typer.Option(help="Shipped name, folder or Hub id.")] = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder of the raw results; a second run goes on.")] = Path(
        "study/results/smollm2-perplexity"
    ),
) -> None:
    """Perplexity and bytes of every row on the same windows, and a table."""
    import torch

    from kvferry.evaluate.sweep import provenance
    from kvferry.models import load
    from study import perplexity as study
    from study.squad.texts import read_squad

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    done = study.read(out)
    if len(done) < n:
        vlm = load(model, dtype="float32")
        facts = {key: value for key, value in provenance(vlm).items() if key in ("commit", "machine")}
        out.mkdir(parents=True, exist_ok=True)

        def tokens(text: str) -> list[int]:
            ids: list[int] = vlm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return ids

        with (out / study.RAW).open("a") as file:
            for i, ids in enumerate(study.windows(read_squad(data / "test.jsonl"), tokens)):
                if i >= n:
                    break
                if i >= len(done):
                    done.append(study.measure(vlm, ids) | facts)
                    file.write(json.dumps(done[-1]) + "\n")
                    file.flush()
    print(f"n = {len(done[:n])} windows\n\n{study.table(done[:n])}")
