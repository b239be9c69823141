"""What crosses the wire. Each mode is one file with the edge's half and the cloud's half of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvferry.codecs.grammar import lookup
from kvferry.errors import InputError, RecipeError
from kvferry.modes.base import CHUNK_BYTES, Mode, OnToken, Question, Receiver, Sender, SessionStore
from kvferry.modes.conversation import Told, Turn, TurnReceiver, TurnSender, brought_up
from kvferry.modes.embeds import EmbedsMode, EmbedsReceiver
from kvferry.modes.holdings import Holdings
from kvferry.modes.image import ImageMode, ImageReceiver
from kvferry.modes.kv import KVMode, KVReceiver
from kvferry.modes.local import LocalMode, answer_here
from kvferry.modes.prompt import PromptMode, PromptReceiver
from kvferry.modes.receiver import ModeReceiver
from kvferry.modes.scout import ScoutMode, ScoutReceiver
from kvferry.modes.translate import TranslateMode, TranslateReceiver
from kvferry.plugins import Registry
from kvferry.wire import service_pb2 as pb
from kvferry.wire.faults import BusyError, NotHeldError, ProtocolError

if TYPE_CHECKING:
    from kvferry.models import VLM

DEFAULT_RECIPE = "balanced"

_OWN: tuple[type[Mode] | type[LocalMode], ...] = (
    KVMode, ImageMode, EmbedsMode, ScoutMode, TranslateMode, PromptMode, LocalMode,
)  # fmt: skip

MODES: Registry[type[Mode] | type[LocalMode]] = Registry("modes", {mode.NAME: mode for mode in _OWN})
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
    pb.MODE_TRANSLATE: TranslateReceiver,
}


def receiver_kind(mode: int) -> Callable[[VLM, pb.AskRequest.Start, SessionStore, int], ModeReceiver]:
    """What makes the cloud's half of a mode of the wire: of this project, or of a plug-in (:attr:`Mode.WIRE`).

    Raises
    ------
    ProtocolError
        There is none.
    """
    if (kind := RECEIVERS.get(mode)) is not None:  # type: ignore[call-overload]
        return kind  # type: ignore[no-any-return]
    for name in MODES.names():
        if getattr(MODES[name], "WIRE", None) == mode:
            return MODES[name].receiver  # type: ignore[union-attr, no-any-return]
    raise ProtocolError(f"this cloud does not know mode {mode}; update it, or install there what brings the mode")


def receiver_of(vlm: VLM, start: pb.AskRequest.Start, store: SessionStore, max_bytes: int) -> Receiver:
    """The cloud's half for one request: that of its mode, or that of a conversation around it."""
    talk = start.conversation if start.HasField("conversation") else None
    if talk is not None and talk.handle:
        return TurnReceiver(vlm, start, store, None)
    first = receiver_kind(start.mode)(vlm, start, store, max_bytes)
    return first if talk is None else TurnReceiver(vlm, start, store, first)


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
    "SessionStore",
    "Told",
    "Turn",
    "TurnSender",
    "answer_here",
    "brought_up",
    "mode_name",
    "parse_mode",
    "receiver_kind",
    "receiver_of",
]
