"""Damaged embeddings and positions: refused by name, on what the service itself would have been given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvferry import VLM
from kvferry.bitstream.sets import encode_set
from kvferry.cloud import Limits
from kvferry.cloud.sessions import Sessions
from kvferry.codecs import Integer
from kvferry.errors import CorruptError, InputError, KVFerryError, TruncatedError
from kvferry.models import VisualEmbeds
from kvferry.modes import RECEIVERS, Holdings, Question, Receiver, parse_mode
from kvferry.modes.embeds import pack_embeds, unpack_embeds
from kvferry.modes.scout import sealed
from kvferry.wire import service_pb2 as pb

QUESTION = "what colour is the circle?"


def sent(vlm: VLM, picture: Path, mode: str) -> tuple[pb.AskRequest.Start, bytes]:
    """What an edge sends."""
    sender = parse_mode(mode).sender(vlm, Question([picture], QUESTION), Holdings())  # type: ignore[union-attr]
    start = sender.start()
    sender.prepare()
    return start, b"".join(sender.chunks())


def receiver(vlm: VLM, start: pb.AskRequest.Start) -> Receiver:
    return RECEIVERS[start.mode](vlm, start, Sessions(Limits()).store(b"", True), 1 << 20)


def take(vlm: VLM, start: pb.AskRequest.Start, data: bytes) -> Receiver:
    one = receiver(vlm, start)
    one.feed(data)
    one.finish()
    return one


@pytest.mark.parametrize("mode", ["embeds:int8", "scout"])
def test_damaged_anywhere(vlm: VLM, picture: Path, mode: str) -> None:
    start, data = sent(vlm, picture, mode)
    whole = take(vlm, start, data).answer(4, lambda *_: None)
    assert len(whole.token_ids) == 4
    for where in range(0, len(data), max(1, len(data) // 60)):
        bad = bytearray(data)
        bad[where] ^= 0x10
        with pytest.raises(KVFerryError):
            take(vlm, start, bytes(bad)).answer(1, lambda *_: None)
        with pytest.raises(KVFerryError):
            take(vlm, start, data[:where])
    with pytest.raises(KVFerryError):
        take(vlm, start, data + b"x")


def test_positions_of_another_number_of_tokens(vlm: VLM, picture: Path) -> None:
    start, data = sent(vlm, picture, "scout")
    file, message = data[: start.items[0].size], encode_set(np.ones(195, np.bool_), [])
    assert take(vlm, start, file + sealed(message, 196)).answer(1, lambda *_: None).token_ids
    with pytest.raises(CorruptError, match="196"):
        take(vlm, start, file + sealed(message, 195)).answer(1, lambda *_: None)


def test_words_bring_nothing_else(vlm: VLM) -> None:
    start = pb.AskRequest.Start(mode=pb.MODE_PROMPT, question=QUESTION)
    with pytest.raises(KVFerryError, match="no bytes"):
        take(vlm, start, b"x")
    start.items.add(handle=1)
    with pytest.raises(KVFerryError, match="no pictures"):
        receiver(vlm, start)


def test_embeddings_come_back(vlm: VLM, picture: Path) -> None:
    (seen,) = vlm.look([picture])
    tokens, hidden = seen.embeds.shape
    data = pack_embeds(seen, Integer(8))
    back = unpack_embeds(data, Integer(8), hidden, 2)
    assert back.grid == seen.grid
    with pytest.raises(CorruptError, match="4 bytes after the last"):
        unpack_embeds(data + b"rest", Integer(8), hidden, 2)
    halves = seen.embeds.float().view(tokens, 2, -1)
    step = halves.abs().amax(-1, keepdim=True) / 127 * 1.008
    assert ((back.embeds.float().view(tokens, 2, -1) - halves).abs() <= step / 2 + halves.abs() / 256 + 1e-6).all()


@pytest.mark.parametrize("grid", [(1, 0, 2), (1, 3, 2), (1, 2, 4), (1 << 20, 2, 2), (1, 1 << 16, 1 << 16)])
def test_impossible_grids(vlm: VLM, picture: Path, grid: tuple[int, int, int]) -> None:
    (seen,) = vlm.look([picture])
    data = pack_embeds(VisualEmbeds(seen.embeds, grid), Integer(4))
    with pytest.raises((InputError, CorruptError, TruncatedError)):
        unpack_embeds(data, Integer(4), seen.embeds.shape[1], 2)
