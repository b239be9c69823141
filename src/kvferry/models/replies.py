"""Answers in the making: many are decoded together, and each says what it would say alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from kvferry.cache import KVCache, LayerCache, Role
from kvferry.errors import InputError
from kvferry.models.resume import Decoder, check_fit, check_token_ids, longer_cache, stop_ids
from kvferry.models.rotary import check_same_turn, moves
from kvferry.models.slots import Slots
from kvferry.models.steady import KEYS
from kvferry.models.steps import Pace, Steps, fed

if TYPE_CHECKING:
    from kvferry.models.vlm import VLM

GROWTH = 4
"""Answers decode together whose caches have room for 128, 512, 2,048 ... tokens a head: up to four times too much."""
ROOM = 1 << 15
"""Tokens a head that one group's rows have room for, or one row's if that is more: a long cache does not bring room for
fifteen others."""


class Reply:
    """One answer: what is fed next, and what has been said.

    Parameters
    ----------
    cache : KVCache
        What it goes on from.
    token_ids : sequence of int
        All that is fed before the answer; the last one gives its first token.
    max_new_tokens : int
        At least 1.
    stop : collection of int
        Tokens that end it.
    on_token : callable
        Called with every token as soon as it is known; what it raises ends this answer only.
    keep : sequence of Role, optional
        See :func:`kvferry.models.resume.continue_from`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        token_ids: Sequence[int],
        max_new_tokens: int,
        stop: Collection[int],
        on_token: Callable[[int], None],
        keep: Sequence[Role] | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        check_fit(model, cache)
        check_token_ids(model, token_ids)
        self.said: list[int] = []
        self.over = False
        self.failure: BaseException | None = None
        self.kept: KVCache | None = None
        self.length = cache.length
        self.layers: Sequence[LayerCache] = cache.layers
        self._cache = cache
        self._fed: list[int] = []
        self._next = list(token_ids)
        self._most = max_new_tokens
        self._stop = stop
        self._on_token = on_token
        self._keep = keep
        self._last = False

    @property
    def room(self) -> int:
        """Tokens that a head may come to hold."""
        return max(max(x.per_head) for x in self.layers) + len(self._next) + self._most

    @property
    def token(self) -> int:
        """What is fed next."""
        return self._next[0]

    @property
    def position(self) -> list[int]:
        """Where it stands, one number per rotary axis."""
        layout = self._cache.layout
        if self.length < len(layout):
            return layout.positions[:, self.length].tolist()  # type: ignore[no-any-return]
        return [self.length + layout.rope_delta] * len(layout.positions)

    def begun(self, model: PreTrainedModel, pace: Pace) -> Steps[None]:
        """Read all that is fed before the answer but for its last token, which others' tokens share a pass with."""
        *before, last = self._next
        if before:
            decoder = Decoder(model, self._cache)
            yield from fed(decoder, before, pace)
            self.layers, self.length = decoder.layers, decoder.length
            self._fed, self._next = before, [last]

    def hear(self, token: int) -> None:
        """The token that follows the one that was fed."""
        self._fed.append(self.token)
        self.length += 1
        if self._last or token in self._stop:
            self.over = True
            return
        self.said.append(token)
        self._next = [token]
        self._last = len(self.said) == self._most
        self.over = self._last and self._keep is None  # else it is fed once more, to be in the cache
        try:
            self._on_token(token)
        except BaseException as error:
            self.over, self.failure = True, error

    def leave(self, slots: Slots, row: int) -> None:
        """It is over: keep the longer cache, if that was wanted."""
        if self._keep is not None and self.failure is None:
            layers = slots.layers(row, self.layers, self.length)
            self.kept = longer_cache(self._cache, layers, self._fed, [*self._keep, *[Role.CONTEXT] * len(self.said)])


class _Group:
    """Answers that share passes."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.replies: list[Reply] = []

    def drop(self, reply: Reply) -> None:
        row = self.replies.index(reply)
        moved = self.slots.leave(row)
        self.replies[row] = self.replies[moved]
        self.replies.pop()


class Replies:
    """Answers that are decoded together; they may begin and end at any step.

    Parameters
    ----------
    model : PreTrainedModel
        With :func:`kvferry.models.attention.attach` applied.
    most : int
        How many may share a pass.
    """

    def __init__(self, model: PreTrainedModel, most: int) -> None:
        self._model = model
        self._most = 1 if moves(model) else most
        self._groups: list[tuple[int, _Group]] = []

    def __len__(self) -> int:
        return sum(len(group.replies) for _, group in self._groups)

    def add(self, reply: Reply) -> None:
        """It goes on with the next step."""
        capacity = KEYS
        while capacity < reply.room:
            capacity *= GROWTH
        for size, group in self._groups:
            if size == capacity and group.slots.free:
                break
        else:
            group = _Group(Slots(self._model, max(1, min(self._most, ROOM // capacity)), capacity))
            self._groups.append((capacity, group))
        group.slots.join(reply.layers)
        group.replies.append(reply)

    def drop(self, reply: Reply) -> None:
        """Nobody waits for it any more."""
        for _, group in self._groups:
            if reply in group.replies:
                group.drop(reply)
        self._tidy()

    def step(self) -> list[Reply]:
        """One token more for those whose turn it is; the answers that are over by it.

        Raises
        ------
        Exception
            What the model raised; it has :attr:`Reply.failure` of all that shared the pass, which are over.
        """
        if not self._groups:
            return []
        size, group = self._groups.pop(0)
        self._groups.append((size, group))
        replies = list(group.replies)
        positions = torch.tensor([reply.position for reply in replies]).T
        try:
            for reply in replies:
                check_same_turn(self._model, max(reply.position), max(reply.position) + 1)
            scores = group.slots.step([x.token for x in replies], [x.length for x in replies], positions)
            for reply, token in zip(replies, scores.argmax(-1).tolist(), strict=True):
                reply.hear(token)
        except Exception as error:
            for reply in replies:
                reply.over, reply.failure = True, reply.failure or error
        over = [reply for reply in replies if reply.over]
        for reply in over:
            reply.leave(group.slots, group.replies.index(reply))
            group.drop(reply)
        self._tidy()
        return over

    def _tidy(self) -> None:
        """Let go of memory that nobody uses, but for the rows of the latest group."""
        self._groups = [(size, group) for size, group in self._groups if group.replies]


def replying(
    vlm: VLM,
    cache: KVCache,
    question: str | None,
    max_new_tokens: int,
    on_token: Callable[[int], None],
    pace: Pace,
    keep: bool = False,
    stop: Collection[int] | None = None,
) -> Steps[Reply]:
    """An answer that is ready to be decoded with others: what :meth:`VLM.resume` would say."""
    vlm.check(cache)
    feed, roles = vlm.feed(cache, question)
    ends = stop_ids(vlm.model) if stop is None else stop
    reply = Reply(vlm.model, cache, feed, max_new_tokens, ends, on_token, roles if keep else None)
    yield from reply.begun(vlm.model, pace)
    return reply
