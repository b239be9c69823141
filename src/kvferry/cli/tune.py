"""``kvferry tune``: the fewest bytes that keep a share of the accuracy."""

from __future__ import annotations

import json as jsonlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from kvferry.cli.console import Device, Dtype, Model, NamedModel, model_of, print_json, typed, waiting
from kvferry.cli.questions import Data, Images, Instruction, MaxNewTokens, Metric, own_questions
from kvferry.errors import InputError
from kvferry.files import write_whole


def tune(
    model: Model = "",
    named: NamedModel = "",
    target: Annotated[float, typer.Option(help="Share of the full cache's accuracy to keep.")] = 0.98,
    protocol: Annotated[str, typer.Option(help="A: ask, then ship; B: ship, then ask.")] = "A",
    recipe: Annotated[list[str] | None, typer.Option(help="Instead of the usual candidates; repeatable.")] = None,
    data: Data = None,
    images: Images = None,
    metric: Metric = "",
    instruction: Instruction = "",
    max_new_tokens: MaxNewTokens = 0,
    split: Annotated[str, typer.Option(help="Without --data: never the one that you will report.")] = "validation",
    folder: Annotated[Path, typer.Option(help="Raw results; an interrupted search goes on.")] = Path("out/tune"),
    out: Annotated[Path | None, typer.Option(help="Write the winner and all standings as JSON.")] = None,
    presets: Annotated[
        Path | None, typer.Option(help="Write the recipes for tiny, balanced and lossless; then --recipe tiny@FILE.")
    ] = None,
    processes: Annotated[int, typer.Option(help="0: one per core; with --data, 1.", min=0)] = 0,
    device: Device = "",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the standings as one JSON object.")] = False,
) -> None:
    """Search recipes on validation questions for the fewest bytes at a target accuracy."""
    from kvferry.evaluate.metrics import metric_of
    from kvferry.fit.tune import Tuning, candidates, questions_needed, standings
    from kvferry.fit.tune import presets as presets_of

    model = model_of(model, named)
    if data is not None:
        own_questions(data, images, json=json)
        if metric_of(metric or "exact").score("yes", ("yes",)) is None:
            raise InputError(f"{metric} has no score for one answer, which tune counts; choose another")
    elif metric or instruction or images or max_new_tokens:
        raise InputError("--metric, --instruction, --images and --max-new-tokens need --data FILE: what to ask")
    if protocol not in ("A", "B"):
        raise InputError(f"--protocol is A or B, not {protocol!r}")
    with waiting(f"loading {model}", json):
        from kvferry.codecs.profile_store import has_profile
        from kvferry.evaluate.sweep import provenance
        from kvferry.models import load

        vlm = load(model, device=device or None, dtype=dtype)
    calibrated = has_profile(vlm.fingerprint)
    recipes = tuple(recipe) if recipe else candidates(calibrated)
    tuning = Tuning(
        model,
        recipes,
        folder / vlm.fingerprint[:12] / protocol,
        protocol,  # type: ignore[arg-type]
        target,
        split,
        device=device,
        dtype=dtype,
        data=str(data or ""),
        images=str(images or ""),
        metric=metric,
        instruction=instruction,
        max_new_tokens=max_new_tokens,
    )
    console = Console(stderr=True, quiet=json)
    if not calibrated and not recipe:
        console.print(f"no profile for the transform codec: `kvferry calibrate {model}` would add candidates")
    for lines in tuning.search(processes or (1 if data else os.cpu_count()) or 1):
        found = standings(lines, target)
        console.print(f"{found[0].n} questions: {len(found)} recipes asked, {sum(x.passes for x in found)} pass")
    winner = next((x for x in found if x.passes), None)
    report = {
        "winner": winner and winner.as_dict(),
        "target": target,
        "protocol": protocol,
        "split": split if data is None else "",
        "data": str(data or ""),
        "standings": [x.as_dict() for x in found],
        "presets": presets_of(lines, target),
        "command": typed(),
        **provenance(vlm),
    }
    if out is not None:
        write_whole(out, jsonlib.dumps(report, indent=1) + "\n")
    if presets is not None:
        kept = ("presets", "protocol", "target", "split", "data", "command", "commit", "model", "fingerprint")
        write_whole(presets, jsonlib.dumps({key: report[key] for key in kept}, indent=1) + "\n")
    if json:
        print_json(report)
        return
    table = Table(
        title=f"Protocol {protocol}, {data.name if data else split}, target {target:.0%} of full", title_justify="left"
    )
    for name in ("recipe", "% of full", "bytes", "passes", "n"):
        table.add_column(name, justify="left" if name == "recipe" else "right", no_wrap=True)
    for x in found:
        mark = "yes" if x.passes else "no"
        table.add_row(x.recipe, f"{100 * x.share:.1f}", f"{x.bytes:,.0f}", mark, str(x.n))
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    if winner is None:
        least = questions_needed(lines, target)
        few = f" ({found[0].n} questions cannot show it, {least} might)" if least and found[0].n < least else ""
        print(f"no recipe keeps {target:.0%} for sure{few}; lower the target or add recipes of more tokens or bits")
    else:
        print(f"fewest bytes: {winner.recipe} ({winner.bytes:,.0f} bytes, {winner.share:.1%} of full)")
