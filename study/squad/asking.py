"""All rows of a plan on one text: one prefill, masks or bitstreams, and what is said on top of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar

import torch

from kvferry.cache import LayerCache
from kvferry.evaluate.sweep import carry
from kvferry.evidence import Prefilled
from kvferry.models import VLM
from kvferry.recipe import Recipe
from study.squad.board import Board
from study.squad.masks import masks
from study.squad.plans import PROXY, Plan
from study.squad.prompts import Prompt
from study.squad.reading import TAIL, Reader, in_bf16, requests_of, scene_of
from study.squad.records import BARE, FULL, Answer, Record
from study.squad.saying import Asking, Said, board_answers, cache_answers, ends_of, full_answers
from study.squad.texts import Text

T = TypeVar("T")

BATCH = 12
"""Caches that are stacked for one pass."""


@dataclass
class Answering:
    """A model, a prompt and a plan."""

    vlm: VLM
    prompt: Prompt
    plan: Plan
    _floor: list[LayerCache] | None = field(default=None, init=False, repr=False)

    def ask(self, text: Text, first: int) -> list[Record]:
        """Every question of a text; ``first`` is the index of its first one."""
        ids = self.prompt.before(self.tokenizer, text.words)
        recipes = [row.partition(" ")[0] for row in self.plan.rows]
        reader = Reader(self.vlm, ids, requests_of(recipes))
        asked = [self.prompt.asked(self.tokenizer, x.text) for x in text.questions]
        ask = self._carried if self.plan.carried else self._hidden if self.plan.protocol == "A" else self._before
        rows = ask(reader, ids, asked)
        records = []
        for i, (question, (full, outcomes)) in enumerate(zip(text.questions, rows, strict=True)):
            length = len(ids) + (len(asked[i]) - 1 if self.plan.protocol == "A" else 0)
            said = self._text(full)
            told = {
                row: Answer(size, x.kl, x.agree, None if (own := self._text(x.ids)) == said else own)
                for row, (size, x) in outcomes.items()
            }
            records.append(
                Record(
                    first + i, self.plan.protocol, text.index, question.title, question.answers,
                    len(ids) + len(asked[i]), length, self._bf16(length), said, told,
                )
            )  # fmt: skip
        return records

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.vlm.tokenizer

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()

    def _bf16(self, length: int) -> int:
        return 4 * self.vlm.layers * self.vlm.kv_heads * self.vlm.head_dim * length

    def _hidden(self, reader: Reader, ids: list[int], asked: list[list[int]]) -> Iterator[_Told]:
        """Protocol A by masks: the rows of all questions on one board."""
        shared = len(ids) - TAIL
        read = [in_cache(reader.read(q, len(q), len(ids) + len(q) - 1)) for q in asked]
        board_layers = [_joined([x.cache.layers[i] for x in read], shared) for i in range(self.vlm.layers)]
        ends = ends_of(self.vlm)
        asking = [Asking(x.cache.length, (q[-1],)) for x, q in zip(read, asked, strict=True)]
        total, own = board_layers[0].kept, _places(read, shared)
        everything = torch.stack([_placed(_all(x), own[j], shared, total) for j, x in enumerate(read)])
        asking = full_answers(Board(self.vlm, board_layers, everything[:, 0]), asking, ends)
        kept = [_placed(masks(x, self.plan.rows), own[j], shared, total) for j, x in enumerate(read)]
        return self._told(Board(self.vlm, board_layers, torch.cat(kept)), asking, self._bare(asked, asking, ends))

    def _before(self, reader: Reader, ids: list[int], asked: list[list[int]]) -> Iterator[_Told]:
        """Protocol B by masks: the text alone is pruned, the question is fed on top."""
        length = len(ids)
        blind = in_cache(reader.read((), 0, length))
        proxy = self.prompt.asked(self.tokenizer, PROXY)
        guided = in_cache(reader.read(proxy, len(proxy), length + len(proxy) - 1))
        sources = {"": blind, "proxy": scene_of(guided, length)}
        ends, layers = ends_of(self.vlm), blind.cache.layers
        asking = [Asking(length, tuple(q)) for q in asked]
        everything = _all(blind).expand(len(asked), -1, -1, -1)
        asking = full_answers(Board(self.vlm, layers, everything), asking, ends)
        labels = [(label, list(rows)) for label, rows in groupby(self.plan.rows, lambda row: row.partition(" ")[2])]
        known = {label: masks(sources[label], _recipes(rows)) for label, rows in labels if label != "oracle"}
        kept = []
        for q in asked:
            for label, rows in labels:
                if label == "oracle":
                    told = scene_of(in_cache(reader.read(q, len(q), length + len(q) - 1)), length)
                    kept.append(masks(told, _recipes(rows)))
                else:
                    kept.append(known[label])
        return self._told(Board(self.vlm, layers, torch.cat(kept)), asking, self._bare(asked, asking, ends))

    def _told(self, board: Board, asking: Sequence[Asking], bare: Sequence[Said]) -> Iterator[_Told]:
        rows = self.plan.rows
        said = board_answers(board, [x for x in asking for _ in rows], ends_of(self.vlm))
        for x, floor, mine in zip(asking, bare, _batched(said, len(rows)), strict=True):
            outcomes: dict[str, tuple[int | None, Said]] = {FULL: (None, Said(x.along))}
            outcomes |= {row: (None, one) for row, one in zip(rows, mine, strict=True)}
            yield x.along, outcomes | {BARE: (None, floor)}

    def _carried(self, reader: Reader, ids: list[int], asked: list[list[int]]) -> Iterator[_Told]:
        """Protocol A by bitstreams: every row's bytes are written, read, and answered from."""
        ends = ends_of(self.vlm)
        for q in asked:
            prefilled = reader.read(q, len(q), len(ids) + len(q) - 1)
            full = carry(prefilled, Recipe.parse(FULL))
            asking = Asking(full.cache.length, (q[-1],))
            board = Board(self.vlm, full.cache.layers, _all(prefilled))
            (asking,) = full_answers(board, [asking], ends)
            outcomes: dict[str, tuple[int | None, Said]] = {FULL: (full.bytes, Said(asking.along))}
            carried = {row: carry(prefilled, Recipe.parse(row)) for row in self.plan.rows}
            apart = [row for row in self.plan.rows if _packed(row) not in carried or _packed(row) == row]
            order = sorted(apart, key=lambda row: carried[row].cache.nbytes)
            said: dict[str, Said] = {}
            for rows in _batched(order, BATCH):
                caches = [carried[row].cache for row in rows]
                said |= dict(zip(rows, cache_answers(self.vlm, caches, asking, ends), strict=True))
            said |= {row: said[_packed(row)] for row in self.plan.rows if row not in said}
            outcomes |= {row: (carried[row].bytes, said[row]) for row in self.plan.rows}
            (bare,) = self._bare([q], [asking], ends)
            yield asking.along, outcomes | {BARE: (len(self.tokenizer.decode(q).encode()), bare)}

    def _bare(self, asked: Sequence[list[int]], asking: Sequence[Asking], ends: frozenset[int]) -> list[Said]:
        """The floor: the same questions behind the prompt's examples, without the text."""
        ids = self.prompt.before(self.tokenizer, "")
        if self._floor is None:
            past = self.vlm.prefill_tokens([*ids, ids[-1]]).cache
            self._floor = [LayerCache(x.keys, x.values, x.positions) for x in past.layers]
        board = Board(self.vlm, self._floor, torch.ones(
            len(asked), self.vlm.layers, self.vlm.kv_heads, len(ids), dtype=torch.bool
        ))  # fmt: skip
        floor = [Asking(len(ids), tuple(q), x.along, x.full) for q, x in zip(asked, asking, strict=True)]
        return board_answers(board, floor, ends)


_Told = tuple[tuple[int, ...], dict[str, tuple[int | None, Said]]]
"""The full cache's answer, and of each row its bytes and what it said."""


def in_cache(prefilled: Prefilled) -> Prefilled:
    """The same with its cache as ``full|bf16`` carries it."""
    return Prefilled(in_bf16(prefilled.cache), prefilled.evidence, prefilled.next_logits)


def _batched(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _packed(row: str) -> str:
    """The row without its lossless stage, which gives the same cache."""
    return row.removesuffix("|zstd")


def _recipes(rows: Sequence[str]) -> list[str]:
    return [row.partition(" ")[0] for row in rows]


def _all(prefilled: Prefilled) -> torch.Tensor:
    layers = prefilled.cache.layers
    return torch.ones(1, len(layers), layers[0].heads, prefilled.cache.length, dtype=torch.bool)


def _joined(layers: Sequence[LayerCache], shared: int) -> LayerCache:
    """What all caches share once, then each one's own rest."""
    keys = torch.cat([layers[0].keys[:, :shared], *(x.keys[:, shared:] for x in layers)], dim=1)
    values = torch.cat([layers[0].values[:, :shared], *(x.values[:, shared:] for x in layers)], dim=1)
    return LayerCache(keys, values, torch.arange(keys.shape[1]).expand(len(keys), -1).contiguous())


def _places(read: Sequence[Prefilled], shared: int) -> list[int]:
    """Where each one's own rest begins."""
    starts = [shared]
    for x in read[:-1]:
        starts.append(starts[-1] + x.cache.length - shared)
    return starts


def _placed(mask: torch.Tensor, start: int, shared: int, total: int) -> torch.Tensor:
    """A mask of one cache, ``[..., length]``, as one of the joined ones, ``[..., total]``."""
    wide = torch.zeros(*mask.shape[:-1], total, dtype=torch.bool)
    wide[..., :shared] = mask[..., :shared]
    wide[..., start : start + mask.shape[-1] - shared] |= mask[..., shared:]
    return wide
