"""``kvferry ask``."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer
from rich.markup import escape

from kvferry.cli.asked import check_reachable, pictures_and_question, turn_of
from kvferry.cli.console import Device, Dtype, SendingBar, console, print_json, waiting
from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.edge import Answer


def ask(
    words: Annotated[
        list[str], typer.Argument(metavar="PICTURE... QUESTION", help="Picture files, then the question.")
    ],
    cloud: Annotated[str, typer.Option(help="host:port of `kvferry serve`.")] = "127.0.0.1:7421",
    model: Annotated[
        str, typer.Option(help="The model on this side: the cloud's for kv and embeds, one of its family for scout.")
    ] = "testbed/cloud",
    device: Device = "",
    dtype: Dtype = "auto",
    recipe: Annotated[
        str, typer.Option(help="How to compress, for mode kv: a recipe, or tiny, balanced or lossless.")
    ] = "balanced",
    mode: Annotated[
        str,
        typer.Option(
            help="What crosses: kv[:RECIPE], image[:QUALITY][,mask=FRACTION], embeds[:CODEC], scout[:SCORER@FRACTION], "
            "prompt, nothing (local), or what suits the link best (auto)."
        ),
    ] = "kv",
    points: Annotated[Path | None, typer.Option(help="What `kvferry profile` measured, for mode auto.")] = None,
    policy: Annotated[
        str, typer.Option(help="How mode auto chooses: risk-aware[:0.1], greedy[:0.8], static:MODE.")
    ] = "risk-aware",
    coordinator: Annotated[
        str | None, typer.Option(help="host:port of `kvferry coordinate`, which shares this uplink out.")
    ] = None,
    no_pixels: Annotated[bool, typer.Option("--no-pixels", help="Refuse modes that send the picture.")] = False,
    no_embeds: Annotated[bool, typer.Option("--no-embeds", help="Refuse modes that send its embeddings.")] = False,
    keep_metadata: Annotated[
        bool, typer.Option("--keep-metadata", help="Let EXIF (place, time, camera) leave with a picture file.")
    ] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print why mode auto chose what it chose.")] = False,
    fallback: Annotated[
        bool, typer.Option("--fallback", help="Answer with the model on this side if the cloud cannot.")
    ] = False,
    ship_first: Annotated[
        bool, typer.Option("--ship-first", help="Compress without looking at the question (protocol B).")
    ] = False,
    tiers: Annotated[int, typer.Option(help="Send the most important tokens first, in so many parts.", min=1)] = 1,
    uplink: Annotated[str | None, typer.Option(help="Emulate a link: a rate like 10mbit, or trace:FILE.")] = None,
    downlink: Annotated[str | None, typer.Option(help="The same for the way back.")] = None,
    delay: Annotated[float, typer.Option(help="One-way delay of the emulated link, in ms.", min=0)] = 0.0,
    deadline: Annotated[float, typer.Option(help="Seconds the question may take.")] = 30.0,
    answer_by: Annotated[
        float | None, typer.Option(help="Seconds after which the cloud answers from the tiers that have arrived.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 16,
    follow: Annotated[
        list[str] | None,
        typer.Option(
            help="A further question, asked with the ones before and their answers in context; repeatable. A new "
            "picture goes before it: '@FILE QUESTION'."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Keep what was sent, for `kvferry inspect`.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Ask a cloud a question about pictures."""
    pictures, question = pictures_and_question(words)
    if follow and save is not None:
        raise InputError("--save keeps what one question sent; leave it out with --follow")
    turns = [(pictures, question), *map(turn_of, follow or [])]
    from kvferry.edge import Edge
    from kvferry.edge.answer import check_answer_by, checked_deadline
    from kvferry.edge.checks import checked_mode
    from kvferry.modes import LocalMode
    from kvferry.policy import read_points

    auto = mode == "auto"
    check_answer_by(answer_by, checked_deadline(deadline))
    if auto == (points is None) or (explain and not auto):
        raise InputError(
            "--mode auto and --points go together, and --explain needs both; `kvferry profile` makes points"
        )
    if points is not None:
        read_points(points)
    rules = [rule for rule, wanted in (("no-pixels", no_pixels), ("no-embeds", no_embeds)) if wanted]
    chosen = None if auto else checked_mode(mode, recipe, rules, ship_first)
    if not (fallback or auto or isinstance(chosen, LocalMode)):
        check_reachable(cloud)
    vlm = None
    if fallback or chosen is None or chosen.needs_model:
        with waiting(f"loading {model}", json):
            from kvferry.models import load

            vlm = load(model, device=device or None, dtype=dtype)
    said: list[str] = []

    def speak(_: int, text: str) -> None:
        said.append(text)
        if not json:
            print(text, end="", flush=True)

    def show(answer: Answer) -> None:
        if json:
            print_json(answer.as_dict())
            return
        print(answer.text.removeprefix("".join(said)))
        said.clear()
        console().print(_summary(answer), style="dim", soft_wrap=True)
        if answer.note:
            console().print(f"note: {answer.note}", soft_wrap=True)
        if explain and answer.why:
            console().print(escape(answer.why), soft_wrap=True)

    with (
        Edge(
            vlm,
            cloud,
            uplink=uplink,
            downlink=downlink,
            delay_ms=delay,
            deadline=deadline,
            points=points,
            policy=policy,
            privacy=rules,
            coordinator=coordinator,
            keep_metadata=keep_metadata,
        ) as edge,
        _copy_to(save) as keep,
    ):
        if follow:
            talk = edge.conversation(
                (),
                recipe=recipe,
                mode=mode,
                ship_first=ship_first,
                tiers=tiers,
                fallback="local" if fallback else None,
            )
            for joining, turn in turns:
                with SendingBar(json) as bar:
                    answer = talk.ask(
                        turn,
                        images=joining,
                        max_new_tokens=max_new_tokens,
                        answer_by=answer_by,
                        on_token=speak,
                        on_sent=bar.show,
                    )
                show(answer)
            return
        with SendingBar(json) as bar:
            answer = edge.ask(
                pictures,
                question,
                recipe=recipe,
                mode=mode,
                ship_first=ship_first,
                tiers=tiers,
                fallback="local" if fallback else None,
                max_new_tokens=max_new_tokens,
                answer_by=answer_by,
                on_token=speak,
                on_sent=bar.show,
                keep=keep,
            )
    show(answer)


def _copy_to(path: Path | None) -> contextlib.AbstractContextManager[BinaryIO | None]:
    if path is None:
        return contextlib.nullcontext()
    try:
        return path.open("wb")
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}); choose another file") from None


def _summary(answer: Answer) -> str:
    """What it cost, in one line."""
    part = f", from {answer.share:.0%} of the cache" if answer.partial else ""
    ratio = (
        f", {answer.bf16_bytes / answer.bitstream_bytes:.1f}x below BF16"
        if answer.bf16_bytes and answer.bitstream_bytes
        else ""
    )
    wire = f"{answer.wire_bytes_up:,} bytes on the wire" if answer.wire_bytes_up is not None else "link not measured"
    what = ":".join(filter(None, [answer.mode, answer.recipe]))
    if answer.mode == "local":
        why = f" because {answer.why_local}" if answer.why_local else ""
        return f"answered here{why}; first token after {answer.seconds.first_token:.3f} s"
    return (
        f"{what}: {answer.bitstream_bytes:,} bytes{ratio}{part}; {wire}; sent in {answer.seconds.send:.3f} s, "
        f"first token after {answer.seconds.first_token:.3f} s, all after {answer.seconds.total:.3f} s"
    )
