"""What crosses the wire. Each mode is one file with the edge's half and the cloud's half of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvferry.codecs.grammar import lookup
from kvferry.errors import InputError, RecipeError
from kvferry.modes.base import CHUNK_BYTES, Mode, OnToken, Question, Receiver, Sender, Shelf
from kvferry.modes.conversation import Told, Turn, TurnReceiver, TurnSender, brought_up
from kvferry.modes.embeds import EmbedsMode, EmbedsReceiver
from kvferry.modes.holdings import Holdings
from kvferry.modes.image import ImageMode, ImageReceiver
from kvferry.modes.kv import KVMode, KVReceiver
from kvferry.modes.local import LocalMode, answer_here
from kvferry.modes.prompt import PromptMode, PromptReceiver
from kvferry.modes.scout import ScoutMode, ScoutReceiver
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import BusyError, NotHeldError, ProtocolError

if TYPE_CHECKING:
    from kvferry.models import VLM

DEFAULT_RECIPE = "balanced"

MODES: dict[str, type[Mode] | type[LocalMode]] = {
    mode.NAME: mode for mode in (KVMode, ImageMode, EmbedsMode, ScoutMode, PromptMode, LocalMode)
}
"""What ``Edge.ask(mode=...)`` may name."""

RECEIVERS: dict[
    pb.Mode,
    type[KVReceiver] | type[ImageReceiver] | type[EmbedsReceiver] | type[ScoutReceiver] | type[PromptReceiver],
] = {
    pb.MODE_KV: KVReceiver,
    pb.MODE_IMAGE: ImageReceiver,
    pb.MODE_EMBEDS: EmbedsReceiver,
    pb.MODE_SCOUT: ScoutReceiver,
    pb.MODE_PROMPT: PromptReceiver,
}


def receiver_of(vlm: VLM, start: pb.AskRequest.Start, shelf: Shelf, max_bytes: int) -> Receiver:
    """The cloud's half for one request: that of its mode, or that of a conversation around it."""
    talk = start.conversation if start.HasField("conversation") else None
    if talk is not None and talk.handle:
        return TurnReceiver(vlm, start, shelf, None)
    first = RECEIVERS[start.mode](vlm, start, shelf, max_bytes)
    return first if talk is None else TurnReceiver(vlm, start, shelf, first)


def parse_mode(text: str, recipe: object = DEFAULT_RECIPE) -> Mode | LocalMode:
    """The mode of ``name[:options]``, such as ``kv:q2c@0.25|int4``, ``image:60,mask=0.25``, ``embeds:int8`` or
    ``scout:vlcache@0.1``.

    Parameters
    ----------
    recipe : str or Recipe
        For mode ``kv`` where its text has none.

    Raises
    ------
    InputError, RecipeError
        It says what is wrong and what exists.
    """
    name, _, options = (part.strip() for part in text.partition(":"))
    try:
        kind = lookup(MODES, name, "mode")
    except RecipeError as error:
        raise InputError(str(error)) from None
    return kind.parse(options or (str(recipe) if kind is KVMode else ""))


def mode_name(mode: pb.Mode) -> str:
    """What people call a mode of the wire."""
    return pb.Mode.Name(mode).removeprefix("MODE_").lower()


__all__ = [
    "CHUNK_BYTES",
    "DEFAULT_RECIPE",
    "MODES",
    "RECEIVERS",
    "BusyError",
    "Holdings",
    "LocalMode",
    "Mode",
    "NotHeldError",
    "OnToken",
    "ProtocolError",
    "Question",
    "Receiver",
    "Sender",
    "Shelf",
    "Told",
    "Turn",
    "TurnSender",
    "answer_here",
    "brought_up",
    "mode_name",
    "parse_mode",
    "receiver_of",
]
