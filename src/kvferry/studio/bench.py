"""One prompt on one model, looked at under many recipes: read once, only selected and encoded anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from kvferry.bitstream.report import Report, inspect
from kvferry.cache import KVCache, PromptLayout, Role
from kvferry.errors import EvidenceError, InputError
from kvferry.evaluate.divergence import divergence
from kvferry.evidence import EvidenceRequest, Prefilled
from kvferry.models import VLM
from kvferry.pictures import jpeg_of
from kvferry.recipe import Recipe, compress, decompress

MAX_NEW_TOKENS = 24
FLOOR = "none|bf16"

Kind = Literal["text", "question", "template", "visual"]


@dataclass(frozen=True)
class Word:
    """A text token of the prompt, or a run of visual ones.

    Parameters
    ----------
    share : float32 ``[layers]``
        Of the heads of each layer that keep it; for visual tokens the mean. None where it is always fed again.
    tokens : int
        How many prompt tokens it stands for.
    """

    text: str
    kind: Kind
    share: npt.NDArray[np.float32] | None
    tokens: int = 1


@dataclass(frozen=True)
class Said:
    """An answer, and how far its cache is from the full one.

    ``kl`` is the mean divergence of the next-token distributions in nats, ``agree`` the share of positions with the
    same most likely token, both over the full cache's answer and its end. ``bytes`` is the whole bitstream.
    """

    text: str
    bytes: int
    kl: float = 0.0
    agree: float = 1.0


@dataclass(frozen=True)
class Part:
    """What some part of a bitstream takes, in bytes."""

    name: str
    bytes: int


@dataclass(frozen=True)
class View:
    """All there is to see of one recipe on one prompt.

    Parameters
    ----------
    kept : float32 ``[layers, length]``
        Share of the heads that keep each prompt token.
    report : Report
        Where the bytes of the bitstream went.
    this, full, floor : Said
        What the recipe's cache, the full cache in BF16, and one without visual tokens answer.
    jpeg_bytes : int
        The pictures as JPEG of quality 90.
    seconds : dict of str to float
        What choosing and encoding, decoding, and answering took just now.
    """

    recipe: Recipe
    kept: npt.NDArray[np.float32]
    layout: PromptLayout
    words: tuple[Word, ...]
    report: Report
    this: Said
    full: Said
    floor: Said
    jpeg_bytes: int
    seconds: dict[str, float]

    @property
    def layers(self) -> int:
        """Layers of the model."""
        return len(self.kept)

    def shown(self, layer: int | None) -> npt.NDArray[np.float32]:
        """``[length]``: the share of heads of one layer, or of all layers and heads, that keep each token."""
        chosen: npt.NDArray[np.float32] = self.kept.mean(0) if layer is None else self.kept[layer]
        return chosen

    def grid(self, picture: int, layer: int | None = None) -> npt.NDArray[np.float32] | None:
        """:meth:`shown` over one picture, ``[rows, columns]``; None where its tokens have no place on it.

        For a video, the mean over its frames.
        """
        grids = self.layout.grids
        if picture >= len(grids):
            return None
        visual = np.flatnonzero(self.layout.visual[: self.kept.shape[1]])
        sizes = [int(np.prod(grid)) for grid in grids]
        start = sum(sizes[:picture])
        mean: npt.NDArray[np.float32] = (
            self.shown(layer)[visual[start : start + sizes[picture]]].reshape(grids[picture]).mean(0)
        )
        return mean

    @property
    def visual_by_layer(self) -> npt.NDArray[np.float32]:
        """Share of the picture's tokens that each layer keeps, ``[layers]``; zeros without a picture."""
        visual = self.layout.visual[: self.kept.shape[1]]
        mean: npt.NDArray[np.float32] = (
            self.kept[:, visual].mean(1) if visual.any() else np.zeros(self.layers, np.float32)
        )
        return mean


def kept_shares(cache: KVCache) -> npt.NDArray[np.float32]:
    """Share of each layer's heads that keep each prompt token, float32 ``[layers, length]``."""
    kept = np.zeros((len(cache.layers), cache.length), np.float32)
    for row, layer in zip(kept, cache, strict=True):
        np.add.at(row, layer.positions.cpu().numpy().ravel(), 1 / layer.heads)
    return kept


def words_of(tokenizer: Any, layout: PromptLayout, kept: npt.NDArray[np.float32]) -> tuple[Word, ...]:
    """The prompt as it is read: text token by token, a picture's tokens together."""
    words: list[Word] = []
    visual, length, at = layout.visual, kept.shape[1], 0
    while at < len(layout):
        end = at + 1
        while visual[at] and end < len(layout) and visual[end]:
            end += 1
        share = kept[:, at : min(end, length)].mean(1) if at < length else None
        if visual[at]:
            words.append(Word("", "visual", share, end - at))
        else:
            words.append(Word(_piece(tokenizer, layout.token_ids[max(0, at - 1) : end]), _kind(layout, at), share))
        at = end
    return tuple(words)


def _piece(tokenizer: Any, ids: npt.NDArray[np.int32]) -> str:
    """What the last of one or two tokens adds to a text; alone it may lose the space before it."""
    before, both = (str(tokenizer.decode(part.tolist())) for part in (ids[:-1], ids))
    return both[len(before) :] if both.startswith(before) else str(tokenizer.decode(ids[-1:].tolist()))


def _kind(layout: PromptLayout, at: int) -> Kind:
    role = layout.role[at]
    return "question" if role == Role.QUESTION else "template" if role == Role.SPECIAL else "text"


def parts_of(report: Report) -> tuple[Part, ...]:
    """Where the bytes of a stream went; the sum is all of them."""
    framing = report.trailer_bytes + sum(frame.overhead_bytes for frame in report.frames)
    return (
        Part("keys and values", report.payload_bytes),
        Part("positions", report.position_bytes),
        Part("header", report.header_bytes),
        Part("framing", framing),
    )


def layer_bytes(report: Report) -> tuple[int, ...]:
    """What each layer takes; empty where a codec writes all layers together."""
    if any(frame.layers > 1 for frame in report.frames):
        return ()
    return tuple(share.total for share in report.by_layer.values())


class Bench:
    """One prompt: prefilled once, again only where a recipe wants to observe what was not observed yet.

    Safe to use from several threads; they take turns.

    Parameters
    ----------
    pictures : sequence of PIL images
    question : str
    ship_first : bool
        Protocol B: the cache is made, and compressed, without the question.

    Raises
    ------
    InputError
        No question.
    """

    def __init__(self, vlm: VLM, pictures: Sequence[Any], question: str, *, ship_first: bool = False) -> None:
        if not question.strip():
            raise InputError("there is no question yet; type one, such as: what colour is the circle?")
        if ship_first and not pictures:
            raise InputError("ship, then ask needs a picture that can be shipped; choose one, or ask first")
        self.vlm = vlm
        self.pictures = tuple(pictures)
        self.question = question.strip()
        self.ship_first = ship_first
        self._requests: tuple[EvidenceRequest, ...] = ()
        self._prefilled: Prefilled | None = None
        self._lock = threading.Lock()

    def view(self, recipe: str | Recipe) -> View:
        """Everything there is to see of a recipe.

        Raises
        ------
        KVFerryError
            The recipe does not parse, does not fit this prompt or this model, or the pictures cannot be read.
        """
        recipe = Recipe.parse(recipe)
        with self._lock:
            return self._view(recipe)

    def _view(self, recipe: Recipe) -> View:
        prefilled = self._read(recipe)
        began = time.perf_counter()
        blob = compress(prefilled, recipe)
        encoded = time.perf_counter()
        report, cache = inspect(blob), decompress(blob, self.vlm.model.device)
        decoded = time.perf_counter()
        this = self._said(cache, len(blob))
        seconds = {
            "encode": encoded - began, "decode": decoded - encoded, "answer": time.perf_counter() - decoded,
        }  # fmt: skip
        kept = kept_shares(cache)
        return View(
            recipe=recipe, kept=kept, layout=cache.layout, words=words_of(self.vlm.tokenizer, cache.layout, kept),
            report=report, this=this, full=self._full, floor=self._floor, jpeg_bytes=self._jpeg_bytes, seconds=seconds,
        )  # fmt: skip

    def _read(self, recipe: Recipe) -> Prefilled:
        missing = [x for x in recipe.requests if x not in self._requests]
        if self._prefilled is None or missing:
            if self.ship_first and any(x.rows == "question" for x in recipe.requests):
                raise EvidenceError(
                    f"{recipe} looks at the question, which is not known yet when the cache is shipped first; "
                    "choose another selection or policy, or ask first"
                )
            wanted = (*self._requests, *missing)
            asked = None if self.ship_first else self.question
            self._prefilled = self.vlm.prefill(self.pictures, asked, requests=wanted)
            self._requests = wanted
        return self._prefilled

    @property
    def _later(self) -> str | None:
        """The question that is asked on top of the cache."""
        return self.question if self.ship_first else None

    @cached_property
    def _reference(self) -> tuple[str, tuple[int, ...], torch.Tensor]:
        """The full cache's answer, its token ids, and the logits along it ``[k + 1, vocabulary]``."""
        cache = self._read(Recipe.parse(FLOOR)).cache
        done = self.vlm.resume(cache, self._later, max_new_tokens=MAX_NEW_TOKENS)
        return done.text, done.token_ids, self.vlm.score(cache, done.token_ids, self._later)

    @cached_property
    def _full(self) -> Said:
        return Said(self._reference[0], self._read(Recipe.parse(FLOOR)).cache.full_bf16_bytes)

    @cached_property
    def _floor(self) -> Said:
        blob = compress(self._read(Recipe.parse(FLOOR)), FLOOR)
        return self._said(decompress(blob, self.vlm.model.device), len(blob))

    @cached_property
    def _jpeg_bytes(self) -> int:
        return sum(len(jpeg_of(picture)) for picture in self.pictures)

    def _said(self, cache: KVCache, nbytes: int) -> Said:
        _, ids, full = self._reference
        done = self.vlm.resume(cache, self._later, max_new_tokens=MAX_NEW_TOKENS)
        logits = self.vlm.score(cache, ids, self._later)
        agree = float((full.argmax(-1) == logits.argmax(-1)).float().mean())
        return replace(Said(done.text, nbytes), kl=divergence(full, logits), agree=agree)
