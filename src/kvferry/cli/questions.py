"""What commands share that ask questions: ``--data FILE`` of one's own, or drawn scenes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.console import console
from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.data import Questions

HELP = (
    "Questions of your own: JSON lines, a JSON array, CSV or Parquet with image or images, question, and perhaps "
    "answer or answers, and context."
)
Data = Annotated[Path | None, typer.Option(help=HELP, show_default=False)]
OldData = Annotated[Path | None, typer.Option("--data", "--questions", help=HELP, show_default=False)]
"""For commands that called it ``--questions`` once."""
Images = Annotated[
    Path | None, typer.Option(help="Folder of the pictures; by default that of --data.", show_default=False)
]
Instruction = Annotated[str, typer.Option(help="A line below every question of --data, such as 'Answer in one word.'")]

Metric = Annotated[
    str,
    typer.Option(
        help="How answers to --data are judged: exact (by default), contains, f1, anls, vqa, yes_no, ...; a wrong name "
        "lists them all.",
        show_default=False,
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer; 0: as the questions ask for.", min=0)]
Jpeg = Annotated[str, typer.Option(help="Also send the pictures, at these JPEG qualities, such as 90,30,10.")]
Embeds = Annotated[str, typer.Option(help="Also send the visual embeddings, in codecs such as int4,int2.")]


def qualities_of(jpeg: str) -> tuple[int, ...]:
    """The numbers of ``--jpeg``."""
    try:
        return tuple(int(x) for x in jpeg.split(",") if x.strip())
    except ValueError:
        raise InputError(f"--jpeg is a list of qualities such as 90,30,10, not {jpeg!r}") from None


def codecs_of(embeds: str) -> tuple[str, ...]:
    """The codecs of ``--embeds``."""
    return tuple(x.strip() for x in embeds.split(",") if x.strip())


def own_questions(
    data: Path, images: Path | None, n: int | None = None, start: int = 0, instruction: str = "", json: bool = False
) -> Questions:
    """Those of a file, checked; fields that mean nothing are named on stderr."""
    from kvferry.data import FIELDS, read_questions

    found = read_questions(data, images, n, start, instruction)
    if found.unused:
        names = f"{', '.join(found.unused[:8])}{', ...' if len(found.unused) > 8 else ''}"
        console(json).print(f"{data.name}: not used: {names} (known are {', '.join(FIELDS)})", markup=False)
    return found


def questions_of(
    data: Path | None, images: Path | None, split: str, n: int | None, drawn: int, instruction: str, json: bool
) -> Questions:
    """Those of ``--data``, all unless ``n`` says how many, or the testbed's, ``drawn`` unless it does."""
    if data is not None:
        return own_questions(data, images, n, instruction=instruction, json=json)
    for option, value in (("--images", images), ("--instruction", instruction)):
        if value:
            raise InputError(f"{option} needs --data FILE, which says what to ask")
    from kvferry.analyze.source import drawn_questions

    return drawn_questions(split, n or drawn)
