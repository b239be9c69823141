"""``python -m study squad-prompt``: how SmolLM2 is asked, chosen on calibration paragraphs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.console import typed
from study.squad import DATA, FOLDER


def squad_prompt(
    data: Annotated[Path, typer.Option(help="Folder of calibration.jsonl.")] = DATA,
    model: Annotated[str, typer.Option(help="Shipped name, folder or Hub id.")] = "smollm2",
    n: Annotated[int, typer.Option(help="Questions.", min=1)] = 24,
    tokens: Annotated[int, typer.Option(help="Of a prompt, at most.", min=384)] = 512,
    folder: Annotated[Path, typer.Option(help="Where prompt.json goes.")] = FOLDER,
) -> None:
    """Ask the full cache in every way that was not tried yet; the one that scores best by F1 is taken."""
    import torch

    from kvferry.evaluate.sweep import provenance
    from kvferry.models import load
    from kvferry.statistics import mean_interval
    from study.squad.choosing import SCORES, Trial, chosen_prompt, counter, fits, room, trial
    from study.squad.prompts import asked_about, candidates
    from study.squad.texts import read_squad, texts

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    vlm = load(model, dtype="float32")
    paragraphs = read_squad(data / "calibration.jsonl")
    prompts, out = candidates(paragraphs), folder / "prompt.json"
    before = json.loads(out.read_text()) if out.is_file() else {}
    known = (n, tokens, vlm.fingerprint) == tuple(before.get(x) for x in ("n", "tokens", "fingerprint"))
    tried, said = (before["candidates"], before["said"]) if known else ({}, {})
    least = min(room(vlm, x, tokens) for x in prompts)
    asked = list(texts(asked_about(paragraphs), counter(vlm), max(least, 128), 4))
    for prompt in prompts:
        if prompt.name in tried:
            continue
        trials: list[Trial] = []
        for text in asked:
            if len(trials) < n:
                trials += trial(vlm, prompt, text)
        means = {x: mean_interval([t.scores[x] for t in trials[:n]]) for x in SCORES}
        means["log-likelihood"] = mean_interval([t.likelihood for t in trials[:n]])
        tried[prompt.name] = {k: [x.mean, x.low, x.high] for k, x in means.items()}
        said[prompt.name] = [x.said for x in trials[:5]]
        figures = ", ".join(f"{k} {x.mean:.3f} [{x.low:.3f}, {x.high:.3f}]" for k, x in means.items())
        print(f"{prompt.name}: {figures}, says {trials[0].said!r}", flush=True)
    found = {
        "n": n, "tokens": tokens, "candidates": tried, "fit": [x.name for x in prompts if fits(vlm, x, tokens)],
        "said": said, "command": typed("python -m study"), **provenance(vlm),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"wrote {out}: {chosen_prompt(vlm, folder, data, tokens).name}")
