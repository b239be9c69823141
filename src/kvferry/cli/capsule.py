"""``kvferry fit capsule``: what a model's visual tokens look like beside each other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvferry.cli.console import Device, Dtype, Model, NamedModel, console, model_of, print_json, typed, waiting
from kvferry.cli.questions import Data, Images, Instruction, questions_of
from kvferry.errors import InputError

DRAWN = 400
TOKENS = 1369
"""Of a picture for which sizes are told by formula: 1024 x 1024 pixels in Qwen2-VL."""


def capsule(
    model: Model = "",
    named: NamedModel = "",
    data: Data = None,
    images: Images = None,
    instruction: Instruction = "",
    split: Annotated[str, typer.Option(help="Of the testbed's questions, without --data.")] = "calibration",
    n: Annotated[
        int | None, typer.Option(help=f"How many questions; all of --data, or {DRAWN} drawn ones.", min=1)
    ] = None,
    hidden: Annotated[
        int, typer.Option(help="Inner units of a layer's network; 0: twice a layer's keys of a token.", min=0)
    ] = 0,
    most: Annotated[float, typer.Option(help="The largest share that the profile serves.")] = 0.6,
    variants: Annotated[
        bool, typer.Option("--variants", help="Networks of values and components of keys as well, to compare.")
    ] = False,
    passes: Annotated[int, typer.Option(help="Over all questions, at most.", min=1)] = 12,
    rate: Annotated[float, typer.Option(help="Of learning, at first.")] = 2e-3,
    patience: Annotated[int, typer.Option(help="Passes without a better held-out loss.", min=1)] = 3,
    probes: Annotated[int, typer.Option(help="Random directions of the logits per question.", min=1)] = 2,
    out: Annotated[
        Path, typer.Option(help="Where the profile goes, for capsule@FILE; FILE.*.partial holds a stopped training.")
    ] = Path("capsule.profile"),
    device: Device = "",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print what was made as one JSON object.")] = False,
) -> None:
    """Networks that rebuild visual tokens' keys, and components of their values, for capsule@FILE."""
    model = model_of(model, named)
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write the profile to; make it first")
    questions = questions_of(data, images, split, n, DRAWN, instruction, json)
    with waiting(f"loading {model}", json):
        from kvferry.codecs.capsule_profile import costs
        from kvferry.evaluate.sweep import provenance
        from kvferry.fit.capsule import TRIED, Plan, fit_capsule
        from kvferry.fit.learn import SIZES, History, Schedule
        from kvferry.models import load

        how = Plan(hidden, most, variants, probes, Schedule(passes, rate, patience))
        vlm = load(model, device=device or None, dtype=dtype)
    began, stderr = time.monotonic(), console(json)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        tasks: dict[str, int] = {}

        def looked(what: str, of: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=of)
            progress.advance(tasks[what])  # type: ignore[arg-type]

        def said(name: str, history: History) -> None:
            stderr.print(
                f"{name}: pass {len(history.held_out)}, training {history.training[-1]:.4f}, held out "
                f"{history.held_out[-1]:.4f} (before {history.before:.4f})"
            )

        facts = provenance(vlm) | {"data": questions.label, "n": questions.total, "command": typed()}
        found = fit_capsule(vlm, questions.each(), how, facts, out, said=said, looked=looked)
    profile = found.profile
    size = found.write(out)
    shape = (vlm.layers, vlm.kv_heads, vlm.head_dim)
    sizes = {name: costs(*of, TOKENS, hidden or 2 * of[1] * of[2], most, TRIED) for name, of in SIZES.items()}
    rows, columns = profile.facts["largest_grid"]
    own = costs(*shape, rows * columns, hidden or 2 * shape[1] * shape[2], most, TRIED)
    seconds = round(time.monotonic() - began, 1)
    if json:
        about = {"out": str(out), "bytes": size, "seconds": seconds, "costs": own, "by_formula": sizes}
        print_json(profile.facts | about)
        return
    print(f"looked at {questions.label}; wrote {out}, {size:,} bytes, in {seconds:.0f} s")
    for error, kl in found.kl.items():
        kept = "kept" if error == found.chosen else "not kept"
        print(f"{error} error: held-out answers at {TRIED:g} move by {kl:.4f} nats; {kept}")
    print(f"for pictures of up to {rows} x {columns} tokens; use it as full|capsule:{TRIED:g}@{out}")
    for name, cost in {"this model": own, **sizes}.items():
        print(
            f"{name}, by formula: {cost['bytes'] / 1e6:.1f} MB, {cost['components'] / 1e6:.2f} million multiplications "
            f"a visual token before sending, {cost['rebuilding'] / 1e6:.2f} million to rebuild it"
        )
