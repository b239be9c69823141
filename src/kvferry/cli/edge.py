"""``kvferry edge``: a model that stays loaded, and asks again and again."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvferry.cli.asked import check_pictures
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
from kvferry.cli.console import Device, Dtype, console, print_json
from kvferry.cli.ending import as_object
from kvferry.errors import InputError, KVFerryError

if TYPE_CHECKING:
    from kvferry.edge import Edge
    from kvferry.edge.sources import Item


def edge(
    pictures: Annotated[
        list[str] | None, typer.Argument(metavar="[PICTURE]...", help="What the first questions are about.")
    ] = None,
    question: Annotated[
        str, typer.Option(help="What to ask about every picture of --watch, --video or --camera.", show_default=False)
    ] = "",
    watch: Annotated[
        Path | None, typer.Option(help="A folder: ask about every picture that comes to lie in it.")
    ] = None,
    video: Annotated[Path | None, typer.Option(help="A video file (extra 'video'); --fps frames a second.")] = None,
    camera: Annotated[
        str | None, typer.Option(help="A camera's device, such as /dev/video0; the newest frame, --fps a second.")
    ] = None,
    camera_format: Annotated[
        str, typer.Option(help="What FFmpeg calls the device's kind: v4l2, avfoundation, dshow.")
    ] = "v4l2",
    fps: Annotated[float, typer.Option(help="Frames a second.", min=0.001, max=1000)] = 0.5,
    count: Annotated[int | None, typer.Option(help="Stop after so many answers.", min=1)] = None,
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
    fallback: Fallback = False,
    ship_first: ShipFirst = False,
    tiers: Tiers = 1,
    uplink: Uplink = None,
    downlink: Downlink = None,
    delay: Delay = 0.0,
    deadline: Deadline = 30.0,
    max_new_tokens: MaxNewTokens = 16,
    json: Annotated[bool, typer.Option("--json", help="Nothing on stderr; answers are JSON in any case.")] = False,
) -> None:
    """Keep the model and the connection, and answer question after question, one JSON object a line.

    Questions come from stdin: PICTURE<TAB>QUESTION, a JSON object with image (or images) and question, or with
    messages; or a picture's name, and then questions about it. Or from --watch, --video or --camera. What is wrong with
    one of them is an object with "error", and the next is asked.
    """
    began = time.perf_counter()
    items = _items(pictures or [], question, watch, video, camera, camera_format, fps)
    ready = connect(
        cloud, model, device, dtype, recipe, mode, points=points, policy=policy, coordinator=coordinator,
        no_pixels=no_pixels, no_embeds=no_embeds, keep_metadata=keep_metadata, fallback=fallback,
        ship_first=ship_first, uplink=uplink, downlink=downlink, delay=delay, deadline=deadline, json=json,
        ca=ca, cert=cert, key=key, token_file=token_file, insecure=insecure, reconnect=reconnect,
    )  # fmt: skip
    console(json).print(f"ready after {time.perf_counter() - began:.1f} s", style="dim")
    options: dict[str, Any] = {
        "recipe": recipe,
        "mode": mode,
        "ship_first": ship_first,
        "tiers": tiers,
        "fallback": "local" if fallback else None,
        "max_new_tokens": max_new_tokens,
    }
    with ready as asks:
        for item in islice(items, count):
            print_json(item.shown | _answered(asks, item, options))


def _items(
    pictures: list[str],
    question: str,
    watch: Path | None,
    video: Path | None,
    camera: str | None,
    camera_format: str,
    fps: float,
) -> Iterator[Item]:
    """What to ask, from the one source that was named."""
    from kvferry.edge.sources import filmed, from_lines, watched

    named = [name for name, value in (("--watch", watch), ("--video", video), ("--camera", camera)) if value]
    if len(named) > 1:
        raise InputError(f"{' and '.join(named)} are two sources; run an edge for each")
    if not named:
        if question:
            raise InputError("--question is for --watch, --video and --camera; without them questions come from stdin")
        check_pictures(pictures)
        return from_lines(_typed(), pictures)
    if not question.strip():
        raise InputError(f"{named[0]} needs a --question to ask about every picture")
    if pictures:
        raise InputError(f"{named[0]} brings the pictures; leave {pictures[0]} out")
    if watch is not None:
        if not watch.is_dir():
            raise InputError(f"there is no folder {watch} to watch; make it first")
        return watched(watch, question)
    if video is not None and not video.is_file():
        raise InputError(f"there is no video {video}; check the path")
    if video is not None:
        return filmed(str(video), question, fps)
    return filmed(str(camera), question, fps, live=True, format=camera_format)


def _typed() -> Iterator[str]:
    """The lines of stdin; bytes that are no text do not end it."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    yield from sys.stdin


def _answered(asks: Edge, item: Item, options: dict[str, Any]) -> dict[str, Any]:
    try:
        if item.error is not None:
            raise item.error
        return asks.ask(list(item.images), item.question, messages=item.messages, **options).as_dict()
    except KVFerryError as error:
        return as_object(error)
