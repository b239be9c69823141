"""``kvferry ask``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from kvferry.cli.asked import pictures_and_question, read_messages, turn_of
from kvferry.cli.connect import (
    CA,
    Cloud,
    Coordinator,
    Deadline,
    Delay,
    Downlink,
    EdgeCert,
    EdgeKey,
    EdgeModel,
    Fallback,
    InClear,
    KeepMetadata,
    MaxNewTokens,
    ModeText,
    NoEmbeds,
    NoPixels,
    Points,
    PolicyText,
    RecipeText,
    Reconnect,
    ShipFirst,
    Tiers,
    TokenFile,
    Uplink,
    connect,
)  # fmt: skip
from kvferry.cli.console import Device, Dtype, SendingBar, Traces, console, print_json
from kvferry.errors import InputError
from kvferry.files import write_whole
from kvferry.telemetry.traces import set_up_traces

if TYPE_CHECKING:
    from kvferry.edge import Answer


def ask(
    words: Annotated[
        list[str] | None, typer.Argument(metavar="PICTURE... QUESTION", help="Picture files, then the question.")
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(help="Instead: a JSON file of messages with role and content, pictures by their path."),
    ] = None,
    cloud: Cloud = "127.0.0.1:7421",
    ca: CA = None,
    cert: EdgeCert = None,
    key: EdgeKey = None,
    token_file: TokenFile = None,
    insecure: InClear = False,
    reconnect: Reconnect = 5.0,
    model: EdgeModel = "testbed/cloud",
    device: Device = "",
    dtype: Dtype = "auto",
    recipe: RecipeText = "balanced",
    mode: ModeText = "kv",
    points: Points = None,
    policy: PolicyText = "risk-aware",
    coordinator: Coordinator = None,
    no_pixels: NoPixels = False,
    no_embeds: NoEmbeds = False,
    keep_metadata: KeepMetadata = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print why mode auto chose what it chose.")] = False,
    fallback: Fallback = False,
    ship_first: ShipFirst = False,
    tiers: Tiers = 1,
    uplink: Uplink = None,
    downlink: Downlink = None,
    delay: Delay = 0.0,
    deadline: Deadline = 30.0,
    answer_by: Annotated[
        float | None, typer.Option(help="Seconds after which the cloud answers from the tiers that have arrived.")
    ] = None,
    max_new_tokens: MaxNewTokens = 16,
    follow: Annotated[
        list[str] | None,
        typer.Option(
            help="A further question, asked with the ones before and their answers in context; repeatable. A new "
            "picture goes before it: '@FILE QUESTION'."
        ),
    ] = None,
    traces: Traces = None,
    save: Annotated[Path | None, typer.Option(help="Keep what was sent, for `kvferry inspect`.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Ask a cloud a question about pictures."""
    if traces:
        set_up_traces(traces, "kvferry-edge")
    said_before = None if messages is None else read_messages(messages, words, follow)
    pictures, question = ([], "") if said_before else pictures_and_question(words or [])
    if follow and save is not None:
        raise InputError("--save keeps what one question sent; leave it out with --follow")
    turns = [(pictures, question), *map(turn_of, follow or [])]
    if explain and mode != "auto":
        raise InputError("--explain says why --mode auto chose what it chose; add that and --points")
    if answer_by is not None:
        from kvferry.edge.answer import check_answer_by

        check_answer_by(answer_by, deadline)
    if said_before is not None:
        from kvferry.edge.checks import asked_of, check_talk
        from kvferry.modes import parse_mode

        check_talk(asked_of((), "", said_before, ship_first, tiers, keep_metadata), parse_mode(mode, recipe))
    ready = connect(
        cloud, model, device, dtype, recipe, mode, points=points, policy=policy, coordinator=coordinator,
        no_pixels=no_pixels, no_embeds=no_embeds, keep_metadata=keep_metadata, fallback=fallback,
        ship_first=ship_first, uplink=uplink, downlink=downlink, delay=delay, deadline=deadline, json=json,
        ca=ca, cert=cert, key=key, token_file=token_file, insecure=insecure, reconnect=reconnect,
    )  # fmt: skip
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

    keep = None if save is None else io.BytesIO()
    with ready as edge:
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
                messages=said_before,
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
    if keep is not None and save is not None:
        write_whole(save, keep.getvalue())
    show(answer)


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
