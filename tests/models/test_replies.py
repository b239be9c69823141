"""Answers that are decoded together say, token for token, what each says alone; prompts and old answers may be read in
parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kvferry.cache import KVCache, Role
from kvferry.models import continue_from, prefill_inputs
from kvferry.models.attention import attached
from kvferry.models.layout import layout_of
from kvferry.models.replies import Replies, Reply
from kvferry.models.resume import Decoder
from kvferry.models.slots import Slots
from kvferry.models.steady import is_steady, steady
from kvferry.models.steps import Pace, Steps, read, recalled
from kvferry.recipe import Recipe, compress, decompress
from tests.models.families import build

FAMILIES = ["qwen2_vl", "gemma2", "gpt_oss", "mistral", "gpt_neox", "cohere2"]
"""M-RoPE, soft caps, sinks, sliding windows, rotated parts of a head, layers without rotation."""
RECIPES = ["full|bf16", "knorm@0.5|bf16", "knorm@0.4,budget=head|bf16", "snapkv@0.3,budget=pyramid:4|bf16"]
NEW = 9


@pytest.fixture(params=[(family, how) for family in FAMILIES for how in ("steady", "plain")], ids="-".join)
def model_and_caches(request: pytest.FixtureRequest) -> tuple[Any, list[KVCache]]:
    family, how = request.param
    model, inputs = build(family)
    if how == "steady":
        assert steady(model)
    caches = [_compressed(model, inputs, recipe) for recipe in RECIPES]
    short = {name: value for name, value in inputs.items() if name in ("input_ids",)}
    if family != "qwen2_vl":
        caches += [_compressed(model, {**short, "input_ids": short["input_ids"][:, :n]}, RECIPES[1]) for n in (9, 14)]
    return model, caches


def _compressed(model: Any, inputs: dict[str, torch.Tensor], text: str) -> KVCache:
    recipe = Recipe.parse(text)
    return decompress(compress(prefill_inputs(model, inputs, recipe.requests), recipe))


def together(model: Any, replies: list[Reply], most: int) -> None:
    """Decode; a new one joins at every step, as far as there is room."""
    waiting, batch = list(replies), Replies(model, most)
    with attached(model):
        while waiting or len(batch):
            if waiting and len(batch) < most:
                batch.add(waiting.pop(0))
            batch.step()


def reply(model: Any, cache: KVCache, new: int = NEW, **options: Any) -> Reply:
    return Reply(model, cache, cache.pending.tolist(), new, (), lambda _: None, **options)


def test_together_as_alone(model_and_caches: tuple[Any, list[KVCache]]) -> None:
    model, caches = model_and_caches
    lengths = [NEW - number % 3 for number in range(len(caches))]
    alone = [continue_from(model, x, max_new_tokens=n, stop=()).token_ids for x, n in zip(caches, lengths, strict=True)]
    replies = [reply(model, x, n) for x, n in zip(caches, lengths, strict=True)]
    together(model, replies, 3)
    assert [tuple(x.said) for x in replies] == alone
    assert len(set(alone)) > 1


def test_long_caches_bring_room_for_themselves_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of as many rows as :data:`ROOM` holds; the answers are the same."""
    model, inputs = build("qwen2_vl")
    caches = [_compressed(model, inputs, recipe) for recipe in RECIPES]
    alone = [continue_from(model, cache, max_new_tokens=NEW, stop=()).token_ids for cache in caches]
    made: list[tuple[int, int]] = []

    class Counted(Slots):
        def __init__(self, model: Any, rows: int, capacity: int) -> None:
            made.append((rows, capacity))
            super().__init__(model, rows, capacity)

    monkeypatch.setattr("kvferry.models.replies.Slots", Counted)
    monkeypatch.setattr("kvferry.models.replies.ROOM", 3 * 128)
    replies = [reply(model, cache) for cache in caches]
    replies.append(Reply(model, caches[0], caches[0].pending.tolist(), 600, (), lambda _: None))
    batch = Replies(model, 16)
    with attached(model):
        for one in replies:
            batch.add(one)
        while not all(one.over for one in replies[:-1]):
            batch.step()
    assert [tuple(one.said) for one in replies[:-1]] == alone
    assert sorted(made) == [(1, 2048), (3, 128), (3, 128)]


def test_what_is_kept(model_and_caches: tuple[Any, list[KVCache]]) -> None:
    """The longer cache is that of an answer alone, of heads of unequal length too, and another question goes on."""
    model, caches = model_and_caches
    replies = [reply(model, cache, keep=()) for cache in caches]
    together(model, replies, 16)
    for cache, one in zip(caches, replies, strict=True):
        alone = continue_from(model, cache, max_new_tokens=NEW, stop=(), keep=()).cache
        assert alone is not None
        assert one.kept is not None
        assert one.kept.length == alone.length
        assert [x.counts for x in one.kept] == [x.counts for x in alone]
        for mine, theirs in zip(one.kept, alone, strict=True):
            assert torch.equal(mine.positions, theirs.positions)
            torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-4)


def test_one_that_fails_or_leaves_disturbs_nobody(model_and_caches: tuple[Any, list[KVCache]]) -> None:
    model, caches = model_and_caches
    alone = [continue_from(model, cache, max_new_tokens=NEW, stop=()).token_ids for cache in caches[:3]]

    def broken(_: int) -> None:
        raise RuntimeError("nobody listens")

    replies = [reply(model, cache) for cache in caches[:3]]
    fails = Reply(model, caches[0], caches[0].pending.tolist(), NEW, (), broken)
    leaves = reply(model, caches[3])
    batch = Replies(model, 16)
    with attached(model):
        for one in (fails, replies[0], leaves, *replies[1:]):
            batch.add(one)
        assert batch.step() == [fails]
        batch.drop(leaves)
        while len(batch):
            batch.step()
    assert str(fails.failure) == "nobody listens"
    assert [tuple(x.said) for x in replies] == alone
    assert len(leaves.said) == 1


class Small(Pace):
    """Parts of so many tokens, however long they take."""

    def note(self, tokens: int, seconds: float) -> None:
        assert tokens <= self.part


def counted(steps: Steps[KVCache]) -> tuple[KVCache, int]:
    count = 0

    def run() -> Iterator[None]:
        nonlocal count
        result = yield from steps
        results.append(result)

    results: list[KVCache] = []
    for _ in run():
        count += 1
    return results[0], count


def test_read_in_parts(model_and_caches: tuple[Any, list[KVCache]]) -> None:
    model, _ = model_and_caches
    family = model.config.model_type
    _, inputs = build(family)
    layout = layout_of(model, inputs)
    with attached(model):
        whole = prefill_inputs(model, inputs).cache
        parts, steps = counted(read(model, inputs, layout, whole.fingerprint, Small(4)))
    assert steps >= (len(layout) - 1) // 4
    assert parts.length == whole.length
    for mine, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.values, theirs.values, rtol=1e-4, atol=1e-4)
    said = [continue_from(model, x, max_new_tokens=NEW).token_ids for x in (parts, whole)]
    assert said[0] == said[1]


def test_old_answers_in_parts(model_and_caches: tuple[Any, list[KVCache]]) -> None:
    """After them the model says what it says after the same tokens one by one, as they were said."""
    model, caches = model_and_caches
    said = torch.randint(2, 80, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    for cache in caches:
        with attached(model):
            decoder = Decoder(model, cache)
            for token in [*cache.pending.tolist(), *said]:
                decoder.feed([token])
            one_by_one = decoder.cache([Role.CONTEXT] * len(said))
            parts, steps = counted(recalled(model, cache, cache.pending.tolist(), said, [], Small(8)))
        assert steps == 6
        more = [continue_from(model, x, [3, 4], NEW, stop=()).token_ids for x in (one_by_one, parts)]
        assert more[0] == more[1]
        if is_steady(model) and model.config.model_type != "gpt_oss":  # its experts are no linear layers
            for mine, theirs in zip(parts, one_by_one, strict=True):
                assert torch.equal(mine.keys, theirs.keys)
                assert torch.equal(mine.values, theirs.values)


def test_a_part_takes_its_time() -> None:
    pace = Pace(64)
    pace.note(64, 0.4)
    assert pace.part == 16, "not less"
    for _ in range(20):
        pace.note(pace.part, pace.part / 10_000)
    assert pace.part == 256, "a power of two that takes up to 50 ms"
