"""What rows say on top of their caches: loyalty along the full cache's own answer, then their own answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvferry.cache import KVCache
from kvferry.models import VLM
from kvferry.models.resume import Decoder, stop_ids
from study.squad.board import Board

MOST = 10
"""Tokens of an answer."""
TOKENS = 256
"""Fed to a board in one pass, but for what one row needs; each is held against all others of its pass."""


@dataclass(frozen=True)
class Said:
    """One row's answer: token ids without the end; KL in nats a token to the full cache and the share of tokens with
    the same first choice, along the full cache's answer and its end."""

    ids: tuple[int, ...]
    kl: float = 0.0
    agree: float = 1.0


def ends_of(vlm: VLM) -> frozenset[int]:
    """Tokens that end an answer: the model's own, and all that hold a line feed."""
    found = getattr(vlm, "_line_ends", None)
    if found is None:
        size = vlm.model.get_input_embeddings().num_embeddings
        texts = vlm.tokenizer.batch_decode([[i] for i in range(min(size, len(vlm.tokenizer)))])
        found = stop_ids(vlm.model) | {i for i, text in enumerate(texts) if "\n" in text}
        vlm._line_ends = found  # type: ignore[attr-defined]
    ends: frozenset[int] = frozenset(found)
    return ends


def greedy(
    step: Callable[[Sequence[int], Sequence[int]], torch.Tensor],
    first: torch.Tensor,
    ends: frozenset[int],
    said: Sequence[Sequence[int]],
) -> list[tuple[int, ...]]:
    """Greedy answers of several rows in step.

    Parameters
    ----------
    step : callable
        Feeds one token to each of some rows; gives their next logits, ``[rows, vocabulary]``.
    first : ``[rows, vocabulary]``
        What follows what each row said before, ``said``.
    """
    answers = [list(x) for x in said]
    going, logits = list(range(len(answers))), first
    while going:
        tokens = logits.argmax(-1).tolist()
        for row, token in zip(going, tokens, strict=True):
            if token not in ends:
                answers[row].append(token)
        going = [
            row for row, token in zip(going, tokens, strict=True) if token not in ends and len(answers[row]) < MOST
        ]
        if going:
            logits = step(going, [answers[row][-1] for row in going])
    return [tuple(x) for x in answers]


@dataclass(frozen=True)
class Asking:
    """What one row of a board is fed: ``feed`` from position ``start`` on, then ``along``, the full cache's answer.

    ``full`` are the full cache's log probabilities after the last of ``feed`` and after each of ``along``.
    """

    start: int
    feed: tuple[int, ...]
    along: tuple[int, ...] = ()
    full: torch.Tensor | None = None


def full_answers(board: Board, asked: Sequence[Asking], ends: frozenset[int]) -> list[Asking]:
    """Every row's own greedy answer as what the others are held against."""
    logits, steps = _feed(board, asked), [0] * len(asked)
    heard = [[x] for x in logits]

    def step(rows: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        places = [asked[row].start + len(asked[row].feed) + steps[row] for row in rows]
        found = board.feed(rows, tokens, places, range(len(rows)))
        for row, one in zip(rows, found, strict=True):
            steps[row] += 1
            heard[row].append(one)
        return found

    answers = greedy(step, logits, ends, [()] * len(asked))
    return [
        Asking(x.start, x.feed, ids, torch.stack(seen[: len(ids) + (len(ids) < MOST)]).log_softmax(-1))
        for x, ids, seen in zip(asked, answers, heard, strict=True)
    ]


def _feed(board: Board, asked: Sequence[Asking]) -> torch.Tensor:
    """The logits after each row's feed."""
    rows = [i for i, x in enumerate(asked) for _ in x.feed]
    ids = [token for x in asked for token in x.feed]
    places = [x.start + i for x in asked for i in range(len(x.feed))]
    last = torch.tensor([len(x.feed) for x in asked]).cumsum(0) - 1
    return board.feed(rows, ids, places, last.tolist())


def board_answers(board: Board, asked: Sequence[Asking], ends: frozenset[int]) -> list[Said]:
    """Loyalty and answer of every row; those that leave the full cache's answer go on by themselves."""
    logits = torch.cat([_forced(board, asked, rows) for rows in _passes(asked)])
    said: list[Said] = []
    leaving, first = [], []
    at = 0
    for row, x in enumerate(asked):
        mine = logits[at : at + _steps(x)]
        at += _steps(x)
        said.append(_loyal(x, mine))
        left = _leaves(x, mine, ends)
        if left is not None:
            board.forget(row, x.start + len(x.feed) + left)
            leaving.append((row, left))
            first.append(mine[left])
    if leaving:
        lengths = {row: asked[row].start + len(asked[row].feed) for row, _ in leaving}
        before = [asked[row].along[:left] for row, left in leaving]
        counts = [len(x) for x in before]

        def step(going: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
            there = [leaving[i][0] for i in going]
            where = [lengths[row] + counts[i] for i, row in zip(going, there, strict=True)]
            for i in going:
                counts[i] += 1
            return board.feed(there, tokens, where, range(len(there)))

        for (row, _), own in zip(leaving, greedy(step, torch.stack(first), ends, before), strict=True):
            said[row] = Said(own, said[row].kl, said[row].agree)
    return said


def cache_answers(vlm: VLM, caches: Sequence[KVCache], asked: Asking, ends: frozenset[int]) -> list[Said]:
    """The same for different caches of one prompt, which are stacked."""
    steps = _steps(asked)
    fed = [*asked.feed, *asked.along[: steps - 1]]
    logits = Decoder(vlm.model, *caches).feed(fed, logits=steps)
    said = [_loyal(asked, mine) for mine in logits]
    leaving = [row for row, mine in enumerate(logits) if _leaves(asked, mine, ends) is not None]
    if leaving:
        decoder = Decoder(vlm.model, *(caches[row] for row in leaving))
        start = decoder.feed(list(asked.feed))[:, -1]
        fed_to = list(range(len(leaving)))

        def step(going: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
            if len(going) < len(fed_to):
                decoder.select([fed_to.index(i) for i in going])
                fed_to[:] = going
            return decoder.feed([[token] for token in tokens])[:, -1]

        answers = greedy(step, start, ends, [()] * len(leaving))
        for row, own in zip(leaving, answers, strict=True):
            said[row] = Said(own, said[row].kl, said[row].agree)
    return said


def _forced(board: Board, asked: Sequence[Asking], mine: Sequence[int]) -> torch.Tensor:
    """The logits of some rows after their feed and after all that is fed of ``along``."""
    rows: list[int] = []
    ids: list[int] = []
    places: list[int] = []
    wanted: list[int] = []
    for row in mine:
        x = asked[row]
        fed = [*x.feed, *x.along[: _steps(x) - 1]]
        wanted += [len(rows) + i for i in range(len(x.feed) - 1, len(fed))]
        rows += [row] * len(fed)
        places += range(x.start, x.start + len(fed))
        ids += fed
    return board.feed(rows, ids, places, wanted)


def _passes(asked: Sequence[Asking]) -> list[list[int]]:
    """Rows that are fed together."""
    passes: list[list[int]] = []
    room = 0
    for row, x in enumerate(asked):
        size = len(x.feed) + _steps(x) - 1
        if size > room:
            passes.append([])
            room = TOKENS
        passes[-1].append(row)
        room -= size
    return passes


def _steps(x: Asking) -> int:
    return len(x.along) + (len(x.along) < MOST)


def _loyal(x: Asking, logits: torch.Tensor) -> Said:
    assert x.full is not None
    other = logits.log_softmax(-1)
    kl = (x.full.exp() * (x.full - other)).sum(-1).clamp(min=0).mean()
    agree = (other.argmax(-1) == x.full.argmax(-1)).double().mean()
    return Said(x.along, round(float(kl), 6), round(float(agree), 4))


def _leaves(x: Asking, logits: torch.Tensor, ends: frozenset[int]) -> int | None:
    """The first step at which the row would say something else than the full cache."""
    for step, token in enumerate(logits.argmax(-1).tolist()):
        same = token == x.along[step] if step < len(x.along) else token in ends
        if not same:
            return step
    return None
