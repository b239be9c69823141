"""``kvferry calibrate`` and ``kvferry calibrate-skip``: what is measured on a model once, before it is used."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import track

from kvferry.cli.console import Device, Dtype, Model, NamedModel, model_of, print_json, typed, waiting
from kvferry.cli.questions import Data, Images, Instruction, questions_of
from kvferry.errors import InputError
from kvferry.files import write_whole

DRAWN = 600
RANK = 256
WIDE = 2048


def calibrate(
    model: Model = "",
    named: NamedModel = "",
    kind: Annotated[
        Literal["transform", "kvtc"], typer.Option(help="For which codec; kvtc needs no --probes.")
    ] = "transform",
    recipe: Annotated[str, typer.Option(help="Its selection comes first; all layers keep the same tokens.")] = "full",
    data: Data = None,
    images: Images = None,
    instruction: Instruction = "",
    split: Annotated[str, typer.Option(help="Of the testbed's questions, without --data.")] = "calibration",
    n: Annotated[
        int | None, typer.Option(help=f"How many questions; all of --data, or {DRAWN} drawn ones.", min=1)
    ] = None,
    structure: Annotated[
        Literal["auto", "joint", "tree"],
        typer.Option(
            help="Of transform's bases: one over all layers of --rank axes (joint), or small ones that leave nothing "
            f"out (tree); auto takes a tree where a token has more than {WIDE} numbers and no --rank is given."
        ),
    ] = "auto",
    rank: Annotated[
        int | None, typer.Option(help=f"Numbers that a token becomes, at most, without a tree; {RANK}.", min=1)
    ] = None,
    probes: Annotated[int, typer.Option(help="Random directions of the logits per question.", min=1)] = 4,
    out: Annotated[Path | None, typer.Option(help="Where the profile goes, for transform@FILE; KIND.profile.")] = None,
    device: Device = "",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print what was made as one JSON object.")] = False,
) -> None:
    """Learn what a model's caches look like: the profile of the transform codec, or of kvtc."""
    model = model_of(model, named)
    out = out or Path(f"{kind}.profile")
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write the profile to; make it first")
    from kvferry.codecs import KVTC, Transform
    from kvferry.codecs.profile import PlainProfile
    from kvferry.fit.kvtc import PlainCalibration
    from kvferry.fit.learn import SIZES
    from kvferry.fit.transform import Calibration
    from kvferry.fit.tree import TreeCalibration, tree_bytes
    from kvferry.recipe import Recipe

    if structure == "tree" and rank is not None:
        raise InputError("a tree has no rank, for it leaves nothing out; leave out --rank or --structure tree")

    questions = questions_of(data, images, split, n, DRAWN, instruction, json)
    plan = Recipe.parse(recipe)
    with waiting(f"loading {model}", json):
        from kvferry.evaluate.sweep import provenance
        from kvferry.models import load

        vlm = load(model, device=device or None, dtype=dtype)
    console = Console(stderr=True, quiet=json)
    wide = 2 * vlm.layers * vlm.kv_heads * vlm.head_dim > WIDE
    calibration: PlainCalibration | Calibration | TreeCalibration
    if kind == "kvtc":
        calibration = PlainCalibration(vlm, plan, rank or RANK)
    elif structure == "tree" or (structure == "auto" and rank is None and wide):
        calibration = TreeCalibration(vlm, plan, probes)
    else:
        calibration = Calibration(vlm, plan, rank or RANK, probes)
    began = time.monotonic()
    for asked in track(questions.each(), "looking at caches", total=questions.total, console=console, transient=True):
        calibration.add(asked)
    facts = provenance(vlm) | {"data": questions.label, "n": calibration.n, "recipe": str(plan), "command": typed()}
    made = calibration.profile(facts)
    blob = made.to_bytes()
    write_whole(out, blob)
    least, most = KVTC.reachable(made) if isinstance(made, PlainProfile) else Transform.reachable(made)
    seconds, memory = time.monotonic() - began, _peak_memory()
    sizes = {name: tree_bytes(*shape) for name, shape in SIZES.items()}
    if json:
        about = {"out": str(out), "bytes": len(blob), "reaches": [least, most], "seconds": round(seconds, 1)}
        print_json(made.facts | about | {"peak_memory": memory, "tree_bytes": sizes})
        return
    print(f"looked at {questions.label} as {plan}; wrote {out}, {len(blob):,} bytes")
    print(f"that took {seconds:.0f} s" + (f" and {memory / 1e9:.1f} GB at most" if memory else ""))
    print(f"{kind}:{least:.4g} is the finest it reaches, {kind}:{most:.4g} the coarsest", end="")
    if "captured" in made.facts:
        captured = ", ".join(f"{share:.2%} of {name}" for name, share in made.facts["captured"].items())
        print(f"; axes capture {captured}")
    else:
        others = " and ".join(f"{size / 1e6:.0f} MB for {name}" for name, size in sizes.items())
        print(f"; by formula its bases would be {others}, pictures and text")
    if isinstance(made, PlainProfile):
        return
    words = made.facts["words"]
    print(f"{words['with_means']:,} of {words['seen']:,} words have a mean of their own")
    if "classes" in made.facts:
        print(f"means of words take {words['energy']:.0%} of text's energy")
        for name, of in made.facts["classes"].items():
            finer = 2 ** (of["octaves"] / 8)
            print(f"{name}: {of['energy']:.0%} of what the answer hangs on, its step {finer:.2g}x as fine")
    for what, basis in (("pictures", made.visual), ("text", made.text)):
        if basis is None or not len(basis.octaves):
            print(f"there was no {what}: caches that hold some are refused")


def _peak_memory() -> int:
    """Bytes that this process took at most; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def calibrate_skip(
    model: Model = "",
    named: NamedModel = "",
    split: Annotated[str, typer.Option(help="Of the testbed's questions.")] = "calibration",
    n: Annotated[int, typer.Option(help="Questions.", min=1)] = 500,
    out: Annotated[Path, typer.Option(help="Where the profile goes, for modality=skip_visual@FILE.")] = Path(
        "skip-visual.json"
    ),
    device: Device = "",
    dtype: Dtype = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the profile as one JSON object.")] = False,
) -> None:
    """Measure how much a question looks at the picture, and from where on the picture can be left out.

    Shipped models come with a profile: there, modality=skip_visual alone is enough.
    """
    model = model_of(model, named)
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write the profile to; make it first")
    from kvferry.fit.skip_visual import make_profile, masses
    from kvferry.testbed.data import SPLITS

    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    with waiting(f"loading {model}", json):
        from kvferry.models import load

        vlm = load(model, device=device or None, dtype=dtype)
    console = Console(stderr=True, quiet=json)
    measured = list(track(masses(vlm, split, n), "looking at questions", total=n, console=console, transient=True))
    profile = make_profile(vlm, split, measured)
    write_whole(out, jsonlib.dumps(profile.as_dict(), indent=1) + "\n")
    if json:
        print_json(profile.as_dict() | {"out": str(out)})
        return
    print(
        f"threshold {profile.threshold:.4f}: skips {profile.skipped_wrongly:.1%} of the questions about the picture, "
        f"keeps it for {profile.kept_needlessly:.1%} of the text-only ones (n = {profile.n}, {split}); written to {out}"
    )
