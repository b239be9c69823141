"""``kvferry fit translator``: what a small model's cache is in a larger model's terms."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import track

from kvferry.cli.console import Device, Dtype, print_json, typed, waiting
from kvferry.cli.questions import Data, Images, Instruction, own_questions
from kvferry.errors import InputError
from kvferry.files import write_whole

if TYPE_CHECKING:
    from kvferry.fit.learn import History
    from kvferry.fit.translator import Scene
    from kvferry.translator import Shapes

DRAWN = 600


def translator(
    small: Annotated[
        str, typer.Argument(metavar="EDGE", help="The small model: shipped name, folder or Hub id.", show_default=False)
    ],
    large: Annotated[
        str, typer.Argument(metavar="CLOUD", help="The large one, which is to read its cache.", show_default=False)
    ],
    data: Data = None,
    images: Images = None,
    instruction: Instruction = "",
    split: Annotated[str, typer.Option(help="Of the testbed's scenes, without --data.")] = "train",
    n: Annotated[
        int | None, typer.Option(help=f"How many questions of --data (all), or drawn scenes ({DRAWN}).", min=1)
    ] = None,
    hidden: Annotated[int, typer.Option(help="Units of the network beside the regression.", min=0)] = 384,
    passes: Annotated[int, typer.Option(help="Over all scenes, to reconstruct keys and values.", min=1)] = 12,
    rate: Annotated[float, typer.Option(help="Of these, at first.")] = 2e-3,
    answer_passes: Annotated[int, typer.Option(help="Over all scenes, by what the large model says.", min=0)] = 0,
    answer_rate: Annotated[float, typer.Option(help="Of these, at first.")] = 1e-4,
    out: Annotated[Path, typer.Option(help="Where it goes, for `kvferry serve --translator FILE`.")] = Path(
        "edge.translator"
    ),
    device: Device = "",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print what was made as one JSON object.")] = False,
) -> None:
    """Learn to turn the small EDGE model's cache into one that the larger CLOUD model answers from."""
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write the translator to; make it first")
    from kvferry.fit.learn import SIZES, Schedule, held_out
    from kvferry.fit.translator import FEWEST, Pair, drawn_scenes, fit_translator, nbytes, scenes_of
    from kvferry.translator import width

    scenes: list[Scene]
    if data is not None:
        questions = own_questions(data, images, n, instruction=instruction, json=json)
        label, scenes = questions.label, list(scenes_of(questions.each()))
    elif images or instruction:
        raise InputError("--images and --instruction need --data FILE, which says what to ask")
    else:
        label, scenes = f"{n or DRAWN} {split} scenes of the testbed", drawn_scenes(split, n or DRAWN)
    training, judged = held_out(scenes, FEWEST, "a translator")
    schedules = Schedule(passes, rate), Schedule(answer_passes, answer_rate) if answer_passes else None
    with waiting(f"loading {small} and {large}", json):
        from kvferry.evaluate.sweep import provenance
        from kvferry.models import load

        pair = Pair(*(load(x, device=device or None, dtype=dtype) for x in (small, large)))
    console = Console(stderr=True, quiet=json, highlight=False)
    facts = provenance(pair.large) | {"edge": small, "data": label, "n": len(scenes), "command": typed()}
    began = time.monotonic()

    def said(stage: str, history: History) -> None:
        last = f"training {history.training[-1]:.4f}, held out {history.held_out[-1]:.4f}"
        console.print(f"{stage}, pass {len(history.held_out)}: {last} (before: {history.before:.4f})")

    made = fit_translator(
        pair, training, judged, hidden, schedules, facts, partial=out.with_name(f"{out.name}.partial"), said=said,
        seen=lambda stream: track(
            stream, "looking at scenes", total=len(stream), console=console, transient=True
        ),
    )  # fmt: skip
    blob = made.to_bytes()
    write_whole(out, blob)
    for stage in made.facts["losses"]:
        out.with_name(f"{out.name}.partial-{stage}").unlink(missing_ok=True)
    seconds = round(time.monotonic() - began, 1)
    known = [_shapes(*SIZES[name]) for name in ("Qwen2-VL-2B", "Qwen2-VL-7B")]
    p, q = map(width, known)
    formula = {"bytes": nbytes(known[0], known[1], hidden), "multiplications": p * q + hidden * (p + q)}
    if json:
        about = {"out": str(out), "bytes": len(blob), "multiplications": made.multiplications, "seconds": seconds}
        print_json(made.facts | about | {"Qwen2-VL-2B to 7B": formula})
        return
    print(f"looked at {label}; wrote {out}, {len(blob):,} bytes, after {seconds:.0f} s")
    for stage, losses in made.facts["losses"].items():
        print(f"{stage}: held-out loss {losses['before']:.4f} before, {min(losses['held_out']):.4f} after")
    print(
        f"{made.multiplications:,} multiplications a token; by formula Qwen2-VL-2B to 7B would take "
        f"{formula['bytes'] / 1e6:,.0f} MB and {formula['multiplications'] / 1e6:,.0f} million multiplications a token"
    )


def _shapes(layers: int, heads: int, dim: int) -> Shapes:
    return ((heads, dim),) * layers
