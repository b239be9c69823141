"""What ``ask`` and ``edge`` share: their options, and an edge that is ready to ask."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvferry.cli.asked import check_reachable
from kvferry.cli.console import waiting
from kvferry.errors import InputError

if TYPE_CHECKING:
    from kvferry.edge import Edge

Cloud = Annotated[str, typer.Option(help="host:port of `kvferry serve`.")]
EdgeModel = Annotated[
    str, typer.Option(help="The model on this side: the cloud's for kv and embeds, one of its family for scout.")
]
RecipeText = Annotated[str, typer.Option(help="How to compress, for mode kv: a recipe, or tiny, balanced or lossless.")]
ModeText = Annotated[
    str,
    typer.Option(
        help="What crosses: kv[:RECIPE], image[:QUALITY][,mask=FRACTION], embeds[:CODEC], scout[:SCORER@FRACTION], "
        "prompt, nothing (local), or what suits the link best (auto)."
    ),
]
Points = Annotated[Path | None, typer.Option(help="What `kvferry profile` measured, for mode auto.")]
PolicyText = Annotated[str, typer.Option(help="How mode auto chooses: risk-aware[:0.1], greedy[:0.8], static:MODE.")]
Coordinator = Annotated[
    str | None, typer.Option(help="host:port of `kvferry coordinate`, which shares this uplink out.")
]
NoPixels = Annotated[bool, typer.Option("--no-pixels", help="Refuse modes that send the picture.")]
NoEmbeds = Annotated[bool, typer.Option("--no-embeds", help="Refuse modes that send its embeddings.")]
KeepMetadata = Annotated[
    bool, typer.Option("--keep-metadata", help="Let EXIF (place, time, camera) leave with a picture file.")
]
CA = Annotated[
    str | None,
    typer.Option(help="Speak TLS, and believe this CA's certificates: a file, or system. $KVFERRY_CA does the same."),
]
EdgeCert = Annotated[Path | None, typer.Option("--cert", help="This edge's certificate, or $KVFERRY_CERT.")]
EdgeKey = Annotated[Path | None, typer.Option("--key", help="Its key, or $KVFERRY_KEY.")]
TokenFile = Annotated[
    Path | None, typer.Option(help="A file with this edge's token; or $KVFERRY_TOKEN_FILE, or $KVFERRY_TOKEN itself.")
]
InClear = Annotated[
    bool, typer.Option("--insecure", help="Speak to another machine without TLS; a token is not sent even so.")
]
Reconnect = Annotated[
    float, typer.Option(help="Where the connection breaks, try for so many seconds to go on by another one.", min=0)
]
Fallback = Annotated[bool, typer.Option("--fallback", help="Answer with the model on this side if the cloud cannot.")]
ShipFirst = Annotated[bool, typer.Option("--ship-first", help="Compress without looking at the question (protocol B).")]
Tiers = Annotated[int, typer.Option(help="Send the most important tokens first, in so many parts.", min=1, max=64)]
Uplink = Annotated[str | None, typer.Option(help="Emulate a link: a rate like 10mbit, or trace:FILE.")]
Downlink = Annotated[str | None, typer.Option(help="The same for the way back.")]
Delay = Annotated[float, typer.Option(help="One-way delay of the emulated link, in ms.", min=0)]
Deadline = Annotated[float, typer.Option(help="Seconds the question may take.")]
MaxNewTokens = Annotated[int, typer.Option(help="Longest answer.", min=1)]


def connect(
    cloud: str,
    model: str,
    device: str,
    dtype: str,
    recipe: str,
    mode: str,
    *,
    points: Path | None,
    policy: str,
    coordinator: str | None,
    no_pixels: bool,
    no_embeds: bool,
    keep_metadata: bool,
    fallback: bool,
    ship_first: bool,
    uplink: str | None,
    downlink: str | None,
    delay: float,
    deadline: float,
    json: bool,
    ca: str | None,
    cert: Path | None,
    key: Path | None,
    token_file: Path | None,
    insecure: bool,
    reconnect: float,
) -> Edge:
    """An edge with the model that its mode needs. What can be seen to be wrong is refused before that is loaded.

    Raises
    ------
    InputError, LinkError
        Options that do not go together, or a cloud that is not there.
    """
    from kvferry.edge import Edge
    from kvferry.edge.answer import checked_deadline
    from kvferry.edge.checks import checked_mode
    from kvferry.modes import LocalMode
    from kvferry.policy import read_points
    from kvferry.security import Credentials

    checked_deadline(deadline)
    auto = mode == "auto"
    if auto == (points is None):
        raise InputError("--mode auto and --points go together; `kvferry profile` makes points")
    if points is not None:
        read_points(points)
    credentials = Credentials.found(ca, cert, key, token_file, insecure)
    for address in filter(None, (cloud, coordinator)):
        credentials.check_for(address)
    rules = [rule for rule, wanted in (("no-pixels", no_pixels), ("no-embeds", no_embeds)) if wanted]
    chosen = None if auto else checked_mode(mode, recipe, rules, ship_first)
    if not (fallback or auto or isinstance(chosen, LocalMode)):
        check_reachable(cloud)
    vlm = None
    if fallback or chosen is None or chosen.needs_model:
        with waiting(f"loading {model}", json):
            from kvferry.models import load

            vlm = load(model, device=device or None, dtype=dtype)
    return Edge(
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
        credentials=credentials,
        reconnect_seconds=reconnect,
    )
