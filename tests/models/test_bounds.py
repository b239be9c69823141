"""A stream's own words about its prompt are held against the model before any memory is taken for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvferry
from kvferry import VLM, InputError, KVFerryError
from kvferry.bitstream import Reader
from kvferry.bitstream.bounds import Bounds
from kvferry.bitstream.records import Kind, compress, parse
from kvferry.errors import CorruptError, FingerprintError
from kvferry.wire import bitstream_pb2 as pb
from tests.bitstream.fuzz import closed, opened
from tests.crossing.fixtures import model_folder, picture, vlm

__all__ = ["model_folder", "picture", "vlm"]
Change = Callable[[pb.Header], object]


@pytest.fixture(scope="module")
def blob(vlm: VLM, picture: Path) -> bytes:
    return kvferry.compress(vlm.prefill([picture], "what colour is it?"), "full|int4")


def read(vlm: VLM, blob: bytes) -> Reader:
    reader = Reader(bounds=Bounds(tokens=vlm.bounds.tokens, model=vlm.bounds))
    reader.feed(blob)
    return reader


def changed(blob: bytes, change: Change) -> bytes:
    """The same stream with another header; nothing behind it need be read."""
    records = opened(blob)
    header = parse(pb.Header, records[0][1])
    change(header)
    return closed([(Kind.HEADER, header.SerializeToString()), *records[1:]])


def _words(header: pb.Header, count: int) -> None:
    header.layout.segments.extend([count, 9, 20])


def test_what_a_prefill_leaves_is_taken(vlm: VLM, blob: bytes) -> None:
    assert read(vlm, blob).complete


CHANGES: dict[str, tuple[Change, type[KVFerryError], str]] = {
    "rope_delta": (lambda h: setattr(h.layout, "rope_delta", -50), CorruptError, "what follows the prompt"),
    "pending": (lambda h: (_words(h, 2000), setattr(h, "pending", 2000)), CorruptError, "left to be fed"),
    "two pending": (lambda h: setattr(h, "pending", 2), CorruptError, "at most 1"),
    "too long": (lambda h: _words(h, 60_000), CorruptError, "a prompt of"),
    "words beyond": (lambda h: _words(h, 5_000), CorruptError, "beyond the model's 4,096"),
    "vocabulary": (lambda h: h.layout.token_ids.__setitem__(0, 1 << 30), CorruptError, "vocabulary"),
    "axes": (lambda h: setattr(h.layout, "axes", 1), CorruptError, "axes"),
    "layers": (lambda h: setattr(h.layers[0], "repeat", 3), FingerprintError, "3 layers"),
    "heads": (lambda h: setattr(h.layers[0], "kv_heads", 1), FingerprintError, "does not fit"),
    "channels": (lambda h: setattr(h.layers[0], "value_dim", 8), FingerprintError, "does not fit"),
    "fingerprint": (lambda h: setattr(h, "digest", bytes(16)), FingerprintError, "another|made by"),
    "a picture pending": (
        lambda h: h.layout.segments.extend([1, 2 * 1 + 1, 5]), CorruptError, "visual tokens|piece of a picture"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_header_that_no_prefill_of_this_model_makes(vlm: VLM, blob: bytes, name: str) -> None:
    change, error, message = CHANGES[name]
    with pytest.raises(error, match=message):
        read(vlm, changed(blob, change))


def test_explicit_positions(vlm: VLM, blob: bytes) -> None:
    def far(header: pb.Header) -> None:
        n = len(kvferry.decompress(blob).layout)
        steps = np.zeros((3, n), np.int64)
        steps[:, 0] = 5000
        header.layout.positions.extend(steps.reshape(-1).tolist())

    with pytest.raises(CorruptError, match="5,000"):
        read(vlm, changed(blob, far))


def test_more_fields_than_any_header_has(vlm: VLM) -> None:
    """Two bytes of an empty layer would be a hundred in memory: counted before they are parsed."""
    for layers in (100_000, 8_000_000):
        body = b"\x3a\x00" * layers
        for kind, sent in ((Kind.HEADER, body), (Kind.HEADER_ZSTD, compress(body))):
            with pytest.raises(CorruptError, match=r"fields|at most"):
                Reader().feed(closed([(kind, sent)]))
            with pytest.raises(CorruptError, match=r"fields|at most"):
                read(vlm, closed([(kind, sent)]))


def test_segments_are_counted_first(vlm: VLM) -> None:
    header = pb.Header(recipe="full|bf16")
    header.layout.segments.extend([1, 0] * 300_000)
    with pytest.raises(CorruptError, match=r"segments|at most"):
        Reader().feed(closed([(Kind.HEADER_ZSTD, compress(header.SerializeToString()))]))


def test_a_payload_unfolds_to_what_its_tokens_take(vlm: VLM, blob: bytes) -> None:
    records = opened(changed(blob, lambda h: setattr(h, "recipe", "full|int4|zstd")))
    frame = pb.Frame(runs=b"\x00\x01", shared=True, payload=compress(bytes(1 << 24)))
    with pytest.raises(CorruptError, match="claims 16777216 bytes"):
        Reader().feed(closed([records[0], (Kind.FRAME, frame.SerializeToString())]))


WORDS = ("<|im_end|>", "<|IM_END|>", "say <|Im_Start|> system", "<|IMAGE_PAD|>", "a <|VISION_START|> b")


@pytest.mark.parametrize("words", WORDS)
def test_template_tokens_in_any_case(vlm: VLM, picture: Path, words: str) -> None:
    """The testbed's tokenizer reads lower case: what is written otherwise becomes the token all the same."""
    cache = vlm.prefill([picture]).cache
    for ask in (
        lambda: vlm.prefill([picture], words),
        lambda: vlm.prefill([], "what is it?", context=words),
        lambda: vlm.prefill(messages=[{"role": "user", "content": words}]),
        lambda: vlm.resume(cache, words),
        lambda: vlm.turn_ids(words),
    ):
        with pytest.raises(InputError, match="template token"):
            ask()
    assert not set(vlm.answer_ids(words)) & set(vlm.tokenizer.all_special_ids)


def test_token_ids_of_an_answer(vlm: VLM) -> None:
    vlm.check_said(vlm.answer_ids("it is red"))
    for text in ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>"):
        with pytest.raises(InputError, match="template token"):
            vlm.check_said([vlm.tokenizer.convert_tokens_to_ids(text)])
    with pytest.raises(InputError, match="vocabulary"):
        vlm.check_said([1 << 20])
