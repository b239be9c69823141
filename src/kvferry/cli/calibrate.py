"""``kvferry calibrate-skip``."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from kvferry.cli.console import print_json, waiting
from kvferry.errors import InputError


def calibrate_skip(
    model: Annotated[str, typer.Argument(help="Shipped name, folder or Hub id.")],
    split: Annotated[str, typer.Option(help="Of the testbed's questions.")] = "calibration",
    n: Annotated[int, typer.Option(help="Questions.", min=1)] = 500,
    out: Annotated[Path, typer.Option(help="Where the profile goes, for modality=skip_visual@FILE.")] = Path(
        "skip-visual.json"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print the profile as one JSON object.")] = False,
) -> None:
    """Measure how much a question looks at the picture, and from where on the picture can be left out.

    Shipped models come with a profile: there, modality=skip_visual alone is enough.
    """
    if not out.parent.is_dir():
        raise InputError(f"there is no folder {out.parent} to write the profile to; make it first")
    from kvferry.evaluate.calibrate import make_profile, masses
    from kvferry.testbed.data import SPLITS

    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    with waiting(f"loading {model}", json):
        from kvferry.models import load

        vlm = load(model)
    console = Console(stderr=True, quiet=json)
    measured = list(track(masses(vlm, split, n), "looking at questions", total=n, console=console, transient=True))
    profile = make_profile(vlm, split, measured)
    out.write_text(jsonlib.dumps(profile.as_dict(), indent=1) + "\n")
    if json:
        print_json(profile.as_dict() | {"out": str(out)})
        return
    print(
        f"threshold {profile.threshold:.4f}: skips {profile.skipped_wrongly:.1%} of the questions about the picture, "
        f"keeps it for {profile.kept_needlessly:.1%} of the text-only ones (n = {profile.n}, {split}); written to {out}"
    )
