"""``embeds``: the edge runs its vision tower only; the cloud prefills its language model with what came out."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from kvferry.bitstream.bounds import Reserve, no_reserve
from kvferry.bitstream.records import CHECKSUM, compress, crc32c, decompress, parse
from kvferry.cache import Modality, PromptLayout, Role
from kvferry.codecs import BF16, Codec, Integer, codec_text, parse_codec
from kvferry.codecs.checks import check_numbers
from kvferry.errors import CorruptError, FingerprintError, InputError, RecipeError, TruncatedError
from kvferry.lazy import torch
from kvferry.modes.base import Question, SessionStore
from kvferry.modes.checks import check_count, check_question, cut
from kvferry.modes.digests import made_digest, pixel_digest
from kvferry.modes.holdings import Holdings
from kvferry.modes.receiver import NeedsAll
from kvferry.pictures import open_picture
from kvferry.wire import modes_pb2
from kvferry.wire import service_pb2 as pb

if TYPE_CHECKING:
    from kvferry.cache import KVCache
    from kvferry.models import VLM, VisualEmbeds
    from kvferry.models.steps import Pace, Steps
    from kvferry.summary import Summary

SIZE = struct.Struct("<I")
OVERHEAD = 64
"""Bytes that a message adds to its payload at most."""


@dataclass(frozen=True)
class EmbedsMode:
    """``embeds``, ``embeds:int8``.

    Parameters
    ----------
    codec
        ``bf16`` or ``int1`` to ``int8``: one scale per token and half of its channels. A zstd stage follows where it
        saves anything.
    """

    NAME: ClassVar[str] = "embeds"
    LEAVES: ClassVar[tuple[str, ...]] = ("embeds",)
    codec: Codec = field(default_factory=BF16)

    def __post_init__(self) -> None:
        if not isinstance(self.codec, BF16 | Integer):
            raise RecipeError(f"visual embeddings travel as bf16 or int1 to int8, not {self.codec.name}")

    @classmethod
    def parse(cls, options: str) -> EmbedsMode:
        """The mode of ``embeds:options``."""
        return cls(parse_codec(options)) if options else cls()  # type: ignore[arg-type]

    @property
    def needs_model(self) -> bool:
        """Whether the edge must hold a model."""
        return True

    def __str__(self) -> str:
        return f"embeds:{codec_text(self.codec)}"

    def sender(self, vlm: VLM | None, question: Question, holdings: Holdings) -> EmbedsSender:
        """The edge's half."""
        if vlm is None:
            raise InputError("mode embeds needs the cloud's vision tower on this side; load its model, or use image")
        return EmbedsSender(self.codec, vlm, question, holdings)


class EmbedsSender:
    """The edge's half. Pictures whose embeddings the cloud holds are not looked at again."""

    bf16_bytes: int | None = None
    kept: Summary | None = None

    def __init__(self, codec: Codec, vlm: VLM, question: Question, holdings: Holdings) -> None:
        from kvferry.models.embeds import check_embeds

        check_count(len(question.images))
        if question.images:
            check_embeds(vlm.model, vlm.image_processor)
        self.prefill_seconds = self.encode_seconds = 0.0
        self._codec = codec
        self._vlm = vlm
        self._question = question.text
        self._holdings = holdings
        self._pictures = [open_picture(image) for image in question.images]
        how = f"{codec_text(codec)} {vlm.vision_fingerprint}"
        self._digests = [made_digest("embeddings", how, [pixel_digest(picture)]) for picture in self._pictures]
        self._items: list[pb.AskRequest.Item] = []
        self._seen: dict[int, VisualEmbeds] = {}

    def start(self) -> pb.AskRequest.Start:
        check_question(self._question)
        self._items = [self._holdings.item(digest) for digest in self._digests]
        return pb.AskRequest.Start(
            mode=pb.MODE_EMBEDS,
            question=self._question,
            fingerprint=self._vlm.vision_fingerprint,
            recipe=codec_text(self._codec),
            items=self._items,
            session=self._holdings.session,
            hold=self._holdings.hold,
        )

    def prepare(self) -> None:
        began = time.perf_counter()
        wanted = [i for i, item in enumerate(self._items) if not item.handle and i not in self._seen]
        self._seen |= dict(zip(wanted, self._vlm.look([self._pictures[i] for i in wanted]), strict=True))
        self.prefill_seconds += time.perf_counter() - began

    def chunks(self) -> Iterator[bytes]:
        return cut(self._pieces())

    def _pieces(self) -> Iterator[bytes]:
        for index, item in enumerate(self._items):
            if not item.handle:
                began = time.perf_counter()
                piece = pack_embeds(self._seen[index], self._codec)
                self.encode_seconds += time.perf_counter() - began
                yield piece


class EmbedsReceiver(NeedsAll):
    """The cloud's half.

    Raises
    ------
    FingerprintError
        The edge has another vision tower.
    """

    def __init__(self, vlm: VLM, start: pb.AskRequest.Start, store: SessionStore, max_bytes: int) -> None:
        del max_bytes  # the service bounds what arrives, and the grid what it unfolds to
        from kvferry.models.embeds import VisualEmbeds, check_embeds

        check_question(start.question, vlm.bounds.longest)
        check_count(len(start.items))
        if start.fingerprint != vlm.vision_fingerprint:
            raise FingerprintError(
                f"the embeddings come from the vision tower {start.fingerprint[:12] or '(none named)'}, the cloud has "
                f"{vlm.name} ({vlm.vision_fingerprint[:12]}); load a model with the same vision tower and "
                "projector on the edge, or send the picture (mode image)"
            )
        if start.items:
            check_embeds(vlm.model, vlm.image_processor)
        self.prefill_seconds = 0.0
        self._vlm = vlm
        self._question = start.question
        self._items = start.items
        self._store = store
        self._held = [store.take(item.handle, VisualEmbeds) if item.handle else None for item in start.items]
        self._pictures: list[VisualEmbeds] = []
        hidden = int(vlm.model.config.get_text_config(decoder=True).hidden_size)
        merge = int(getattr(vlm.image_processor, "merge_size", 1))
        coming = sum(held is None for held in self._held)
        known = sum(len(held.embeds) for held in self._held if held is not None)
        codec = EmbedsMode.parse(start.recipe).codec
        self._unpacker = Unpacker(codec, hidden, merge, coming, known, store.reserve)

    def feed(self, data: bytes) -> None:
        self._unpacker.feed(data)

    def finish(self) -> None:
        coming = iter(self._unpacker.finish())
        for item, held in zip(self._items, self._held, strict=True):
            self._pictures.append(next(coming) if held is None else held)
            if held is None:
                self._store.put(item.digest, self._pictures[-1], self._pictures[-1].nbytes)

    def grounding(self, pace: Pace) -> Steps[tuple[KVCache, str | None]]:
        from kvferry.models.steps import reading

        began = time.perf_counter()
        cache = yield from reading(self._vlm, self._pictures, self._question, pace)
        self.prefill_seconds = time.perf_counter() - began
        return cache, None


def pack_embeds(picture: VisualEmbeds, codec: Codec) -> bytes:
    """One picture's embeddings with size and checksum.

    The codec sees halves of the channels where it expects keys and values.
    """
    tokens, hidden = picture.embeds.shape
    keys, values = picture.embeds.view(tokens, 2, hidden // 2).transpose(0, 1).unsqueeze(1)
    payload = codec.encode(0, keys, values, *_stand_in(tokens))
    squeezed = compress(payload)
    smaller = len(squeezed) < len(payload)
    body = modes_pb2.Embeddings(grid=picture.grid, payload=squeezed if smaller else payload, zstd=smaller)
    data = body.SerializeToString()
    return SIZE.pack(len(data)) + data + CHECKSUM.pack(crc32c(data))


class Unpacker:
    """Visual embeddings from bytes as they arrive; no more is kept of them than one picture can take.

    Parameters
    ----------
    hidden, merge_size : int
        Of the model.
    pictures : int
        That will come.
    tokens : int
        Visual tokens of the prompt's other pictures.
    reserve : callable
        See :class:`kvferry.bitstream.Reader`.

    Raises
    ------
    CorruptError, InputError
        :meth:`feed`: the bytes cannot be right; at the first that is too many.
    """

    def __init__(
        self,
        codec: Codec,
        hidden: int,
        merge_size: int,
        pictures: int,
        tokens: int = 0,
        reserve: Reserve = no_reserve,
    ) -> None:
        self._reserve = reserve
        self._codec, self._hidden, self._merge_size = codec, hidden, merge_size
        self._coming, self._tokens = pictures, tokens
        self._data = bytearray()
        self._done: list[VisualEmbeds] = []

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        self._reserve(len(data))
        self._data += data
        while len(self._data) >= SIZE.size and self._coming:
            size = SIZE.unpack_from(self._data)[0]
            if size > self._most(self._room) + OVERHEAD:
                raise CorruptError(f"{size:,} bytes announced, more than the embeddings of one prompt take")
            end = SIZE.size + size + CHECKSUM.size
            if len(self._data) < end:
                return
            body = bytes(self._data[SIZE.size : end - CHECKSUM.size])
            if CHECKSUM.unpack_from(self._data, end - CHECKSUM.size)[0] != crc32c(body):
                raise CorruptError("visual embeddings arrived damaged (checksum); send them again")
            del self._data[:end]
            self._done.append(self._picture(body))
            self._coming -= 1
        if self._data and not self._coming:
            raise CorruptError(f"{len(self._data)} bytes after the last picture's embeddings; send them again")

    def finish(self) -> list[VisualEmbeds]:
        """All of them, in bfloat16; :class:`TruncatedError` where they have not all come."""
        if self._coming:
            raise TruncatedError(f"visual embeddings end after {len(self._data)} bytes; send them again")
        return self._done

    @property
    def _room(self) -> int:
        """Visual tokens that the prompt still takes."""
        from kvferry.models.embeds import MAX_VISUAL_TOKENS

        return max(MAX_VISUAL_TOKENS - self._tokens, 0)

    def _most(self, tokens: int) -> int:
        """Bytes of a payload."""
        return tokens * (2 * self._hidden + 16)

    def _picture(self, body: bytes) -> VisualEmbeds:
        from kvferry.models.embeds import VisualEmbeds, check_shape, check_total, visual_tokens

        message = parse(modes_pb2.Embeddings, body)
        if len(message.grid) != 3:
            raise CorruptError(f"a patch grid of {len(message.grid)} numbers, where 3 were expected")
        grid = (message.grid[0], message.grid[1], message.grid[2])
        tokens = visual_tokens(grid, self._merge_size)
        self._tokens += tokens
        check_total(self._tokens)
        self._reserve(self._most(tokens) + 8 * tokens * self._hidden)
        payload = decompress(message.payload, self._most(tokens)) if message.zstd else message.payload
        shape = (1, tokens, self._hidden // 2)
        keys, values = self._codec.decode(0, payload, shape, shape, *_stand_in(tokens))
        check_numbers(0, embeddings=keys, others=values)
        picture = VisualEmbeds(torch.cat((keys, values), dim=-1)[0], grid)
        check_shape(picture, self._hidden, self._merge_size)
        return picture


def unpack_embeds(data: bytes, codec: Codec, hidden: int, merge_size: int) -> VisualEmbeds:
    """What :func:`pack_embeds` was given, in bfloat16; see :class:`Unpacker`."""
    unpacker = Unpacker(codec, hidden, merge_size, 1)
    unpacker.feed(data)
    return unpacker.finish()[0]


def _stand_in(tokens: int) -> tuple[torch.Tensor, PromptLayout]:
    """Positions and layout for a codec that looks at neither."""
    index = np.arange(tokens, dtype=np.int32)
    kind = np.full(tokens, Modality.IMAGE, dtype=np.uint8)
    layout = PromptLayout(index, kind, np.full_like(kind, Role.CONTEXT), index[None])
    return torch.arange(tokens)[None], layout
