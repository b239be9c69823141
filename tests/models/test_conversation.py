"""A conversation's cache: what a model that read all of it at once would say, and the same to the bit when recalled."""

from __future__ import annotations

import pytest
import torch

import kvferry
from kvferry import VLM, InputError, compress, decompress
from kvferry.cache import KVCache, Role
from kvferry.testbed.data import Sample, sample
from kvferry.testbed.words import IMAGE_PAD

FURTHER = ("what colour is the star?", "how many squares are there?", "what number is on the cyan shape?")
NEW = 3


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return kvferry.load("testbed/cloud")


@pytest.fixture(scope="module")
def drawn() -> Sample:
    return sample("validation", 9, kinds=("pair", "colour", "word"))


ROUNDING = 0.02
"""Relative; bfloat16 rounds by 0.004 at most, a few layers after one another."""


def near(one: KVCache, other: KVCache) -> bool:
    """The same tokens at the same places; numbers that differ by rounding at most."""
    for x, y in zip(one, other, strict=True):
        for a, b in ((x.keys, y.keys), (x.values, y.values)):
            if float((a.float() - b.float()).norm() / a.float().norm()) > ROUNDING:
                return False
    places = [(x.positions, y.positions) for x, y in zip(one, other, strict=True)]
    tokens = one.layout.token_ids.tolist() == other.layout.token_ids.tolist()
    roles = one.layout.role.tolist() == other.layout.role.tolist()
    return tokens and roles and one.length == other.length and all(torch.equal(a, b) for a, b in places)


def test_as_transformers_reads_it_whole(vlm: VLM, drawn: Sample) -> None:
    """Greedy answers on the template's own text of the whole conversation, with nothing kept between turns."""
    done = vlm.resume(vlm.prefill(drawn.images, drawn.question).cache, max_new_tokens=NEW, keep=True)
    user = [{"type": "image"}] * len(drawn.images) + [{"type": "text", "text": drawn.question}]
    messages: list[dict[str, object]] = [{"role": "user", "content": user}]
    pixels = vlm.image_processor(images=drawn.images, return_tensors="pt")
    pads = [IMAGE_PAD * int(grid.prod() // vlm.image_processor.merge_size**2) for grid in pixels["image_grid_thw"]]
    for question in FURTHER:
        messages += [
            {"role": "assistant", "content": [{"type": "text", "text": done.text}]},
            {"role": "user", "content": [{"type": "text", "text": question}]},
        ]
        text = vlm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        parts = text.split(IMAGE_PAD)
        whole = "".join(a + b for a, b in zip(parts, [*pads, ""], strict=True))
        ids = vlm.tokenizer(whole, add_special_tokens=False, return_tensors="pt")["input_ids"]
        pictures = (ids == vlm.model.config.image_token_id).int()
        said = vlm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=pictures,
            max_new_tokens=NEW,
            do_sample=False,
            **pixels,
        )[0, ids.shape[1] :].tolist()
        assert done.cache is not None
        done = vlm.resume(done.cache, question, max_new_tokens=NEW, keep=True)
        assert done.cache is not None
        assert done.cache.layout.token_ids.tolist() == [*ids[0].tolist(), *done.token_ids]
        assert said[: len(done.token_ids)] == list(done.token_ids)
        assert len(done.token_ids) == NEW or len(said) == len(done.token_ids) + 1


@pytest.mark.parametrize("recipe", ["full|bf16", "knorm@0.3|int8", "leaveout@0.3,budget=head|bf16"])
@pytest.mark.parametrize("scene", [False, True])
def test_recalled(vlm: VLM, drawn: Sample, recipe: str, scene: bool) -> None:
    question = drawn.question if scene else None
    prefilled = vlm.prefill(drawn.images, None if scene else drawn.question, recipe=recipe)
    cache = again = decompress(compress(prefilled, recipe))
    kept = [layer.per_head for layer in cache]
    before = cache.layout.token_ids.tolist()
    for asked in (question, *FURTHER):
        done = vlm.resume(cache, asked, max_new_tokens=NEW, keep=True)
        again = vlm.recall(again, done.token_ids, asked)
        assert done.cache is not None
        assert near(done.cache, again), "an old answer is read in parts, which rounds otherwise than word by word"
        cache = done.cache
    assert len(cache.pending) == 0
    assert cache.layout.token_ids[: len(before)].tolist() == before
    longer = cache.length - prefilled.cache.length
    assert [layer.per_head for layer in cache] == [tuple(n + longer for n in each) for each in kept]
    asked_tokens = cache.layout.token_ids[cache.layout.role == Role.QUESTION].tolist()
    words = [drawn.question, *FURTHER]
    assert asked_tokens == [x for text in words for x in vlm.tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_the_cache_before_stays(vlm: VLM, drawn: Sample) -> None:
    """Two different questions may follow the same answer."""
    first = vlm.resume(vlm.prefill(drawn.images, drawn.question).cache, max_new_tokens=NEW, keep=True).cache
    assert first is not None
    said = [vlm.resume(first, question, max_new_tokens=NEW).token_ids for question in FURTHER]
    assert [vlm.resume(first, question, max_new_tokens=NEW).token_ids for question in FURTHER] == said
    assert len(set(said)) > 1


def test_refusals(vlm: VLM, drawn: Sample) -> None:
    prefilled = vlm.prefill(drawn.images, drawn.question).cache
    done = vlm.resume(prefilled, max_new_tokens=1, keep=True)
    assert done.cache is not None
    assert vlm.resume(prefilled, max_new_tokens=1).cache is None
    with pytest.raises(InputError, match="ends with an answer"):
        vlm.resume(done.cache)
    with pytest.raises(InputError, match="already holds a question"):
        vlm.recall(prefilled, [1], "and?")
    with pytest.raises(InputError, match="template token"):
        vlm.resume(done.cache, "<|im_end|>")
    with pytest.raises(InputError, match="vocabulary"):
        vlm.recall(prefilled, [10**6])
    with pytest.raises(InputError, match="new conversation"):
        vlm.recall(prefilled, [1] * 4096)
