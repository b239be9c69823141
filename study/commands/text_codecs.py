"""``python -m study text-codecs``: codecs on text with SmolLM2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def text_codecs(
    data: Annotated[Path, typer.Option(help="Folder with calibration.jsonl and test.jsonl.")] = Path(
        "../shared/data/squad"
    ),
    n: Annotated[int, typer.Option(help="Prompts of the test split.", min=1)] = 60,
    profiles: Annotated[Path, typer.Option(help="Folder of profiles, made where they are not there.")] = Path(
        "out/text-codecs"
    ),
    out: Annotated[Path, typer.Option(help="Raw results; a second run goes on.")] = Path(
        "study/results/smollm2-codecs/paragraphs.jsonl"
    ),
) -> None:
    """Bytes, KL and top-1 agreement of every codec on the same prompts, and a table."""
    import kvferry
    from kvferry.evaluate.sweep import provenance
    from study import text_codecs as study
    from study.profiles import about, make_profiles

    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if len(done) < n:
        vlm = kvferry.load("smollm2", dtype="float32")
        rows = study.paragraphs(data, "calibration")
        make_profiles(vlm, lambda: study.calibration(vlm, rows), "SQuAD paragraphs, calibration", profiles, print)
        out.with_name(study.PROFILES).write_text(json.dumps(about(profiles), indent=1) + "\n")
        recipes = study.recipes(profiles)
        facts = {key: value for key, value in provenance(vlm).items() if key in ("commit", "machine")}
        with out.open("a") as file:
            for i, (context, question) in enumerate(study.prompts(vlm, study.paragraphs(data, "test"), n)):
                if i < len(done):
                    continue
                done.append(study.measure(vlm, context, question, recipes) | facts)
                file.write(json.dumps(done[-1]) + "\n")
                file.flush()
    lengths = [record["tokens"] for record in done[:n]]
    print(f"SmolLM2-135M, {len(lengths)} prompts of {min(lengths)} to {max(lengths)} tokens\n")
    print(study.table(done[:n]))
