"""``python -m study squad-sweep``: SmolLM2's answers to SQuAD's questions from compressed caches."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated

import typer

from kvferry.cli.console import typed
from study.squad import DATA, FOLDER, PROFILES


def squad_sweep(
    plan: Annotated[str, typer.Argument(help="scorers, blind, codecs, coders or profiles, see study/squad/plans.py.")],
    tokens: Annotated[int, typer.Option(help="Of a prompt, at most.", min=384)] = 512,
    n: Annotated[int, typer.Option(help="Questions that the file shall hold.", min=1)] = 200,
    minutes: Annotated[float, typer.Option(help="Stop after so many minutes of processor time.")] = 1e9,
    data: Annotated[Path, typer.Option(help="Folder of calibration.jsonl and test.jsonl.")] = DATA,
    ask: Annotated[str, typer.Option("--prompt", help="Instead of the one that was chosen.")] = "",
    model: Annotated[str, typer.Option(help="Shipped name, folder or Hub id.")] = "smollm2",
    out: Annotated[Path | None, typer.Option(help="JSON lines, continued if they are there.")] = None,
) -> None:
    """Ask the test split's questions; the prompt is the one that ``squad-prompt`` chose."""
    import torch

    from kvferry.evaluate.sweep import provenance
    from kvferry.models import load
    from study.profiles import about, make_profiles
    from study.squad.asking import Answering
    from study.squad.choosing import calibration, chosen_prompt, counter, room
    from study.squad.plans import canonical, plan_of
    from study.squad.prompts import prompt_of
    from study.squad.records import append, begin, go_on
    from study.squad.texts import read_squad, texts

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    wanted = plan_of(plan, tokens)
    vlm = load(model, dtype="float32")
    prompt = prompt_of(ask, read_squad(data / "calibration.jsonl")) if ask else chosen_prompt(vlm, FOLDER, data)
    out = out or FOLDER / f"{plan}-{tokens}.jsonl"
    head = {"command": typed("python -m study"), **provenance(vlm)}
    if wanted.profiles:
        make_profiles(
            vlm, lambda: calibration(vlm, prompt, read_squad(data / "calibration.jsonl"), tokens),
            f"SQuAD's calibration paragraphs, prompt {prompt.name}, {tokens} tokens", PROFILES, print,
        )  # fmt: skip
        head["profiles"] = about(PROFILES)
    what = {
        "name": plan, "model": model, "prompt": prompt.name, "tokens": tokens, "protocol": wanted.protocol,
        "rows": list(canonical(wanted.rows)), "questions": wanted.questions,
    }  # fmt: skip
    done = begin(out, what, head)
    answering = Answering(vlm, prompt, wanted)
    first, held, began, new = 0, 0, time.process_time(), 0
    for text in texts(read_squad(data / "test.jsonl"), counter(vlm), room(vlm, prompt, tokens), wanted.questions):
        if held >= n or time.process_time() - began > 60 * minutes:
            break
        if text.index not in done:
            if not new:
                go_on(out, head)
            append(out, answering.ask(text, first))
            new += len(text.questions)
        first += len(text.questions)
        held += len(text.questions)
    seconds = (time.process_time() - began) / max(new, 1)
    print(f"wrote {out}: {new} new questions, {held} in all, {seconds:.1f} seconds of processor time each")
