"""Batches: every sequence answers and keeps as if it were alone; further turns; beams; what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvferry.errors import InputError, UnsupportedModelError
from kvferry.models import compressing, layout_of
from kvferry.models.attention import Session, session
from kvferry.models.cache_layers import NEVER, KeptLayer, RaggedLayer
from kvferry.models.layout import prompts_of
from kvferry.models.support import text_config, text_config_key
from tests.models.families import END, IMAGE, build

Inputs = dict[str, torch.Tensor]

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, "return_dict_in_generate": True}
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
PICTURES: dict[str, list[list[int]]] = {
    "qwen2_vl": [[9, 12], [4], []], "qwen2_5_vl": [[9, 12], [4], []], "qwen3_vl": [[9, 12], [4], []],
    "llava": [[16], [16, 16], []], "gemma3": [[4, 4], [4], []],
}  # fmt: skip
"""Per prompt, how many tokens each of its pictures takes."""
RECIPES = [
    "vlcache@0.3",
    "vlcache@0.4,budget=sparsity,modality=adaptive",
    "snapkv@0.4,window=4,budget=head",
    "q2c@0.5|int8",
    "snapkv@0.5,window=4,merge=lookm",
]


def words(count: int) -> torch.Tensor:
    return torch.randint(2, 80, (count,))


def prompt(family: str, pictures: Sequence[int], text: int) -> Inputs:
    """Words, pictures with two words between them, a question of ``text`` words."""
    parts = [words(3), *(x for size in pictures for x in (torch.full((size,), IMAGE), words(2))), words(text)]
    ids = torch.cat(parts)[None]
    inputs = {"input_ids": ids}
    if family.startswith("qwen") and family != "qwen2":
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        grids = {4: (1, 4, 4), 9: (1, 6, 6), 12: (1, 6, 8)}
        if pictures:
            inputs["image_grid_thw"] = torch.tensor([grids[size] for size in pictures])
            inputs["pixel_values"] = torch.randn(4 * sum(pictures), 3 * 2 * 4 * 4)
    elif pictures:
        inputs["pixel_values"] = torch.randn(len(pictures), 3, 16, 16)
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    return inputs


def prompts(family: str) -> list[Inputs]:
    """Three prompts of different lengths; where the family sees, of different pictures, and one of none."""
    torch.manual_seed(5)
    pictures = PICTURES.get(family, [[], [], []])
    return [prompt(family, some, text) for some, text in zip(pictures, (9, 14, 40), strict=True)]


def together(alone: Sequence[Inputs], extra: int = 0) -> Inputs:
    """One batch, padded on the left, by ``extra`` tokens more than it takes."""
    n = max(x["input_ids"].shape[1] for x in alone) + extra
    batch: Inputs = {}
    for name in {key for one in alone for key in one} | {"attention_mask"}:
        some = [torch.ones_like(x["input_ids"]) if name == "attention_mask" else x.get(name) for x in alone]
        if name in PER_TOKEN:
            some = [torch.nn.functional.pad(x, (n - x.shape[1], 0)) for x in some if x is not None]
        batch[name] = torch.cat([x for x in some if x is not None])
    return batch


def use(model: Any, name: str) -> None:
    key = text_config_key(model)
    model.set_attn_implementation(name if key is None else {key: name})


def positions(layer: KeptLayer, row: int, start: int) -> list[list[int]]:
    """What each head of one sequence stores, counted from its own first token."""
    if isinstance(layer, RaggedLayer):
        heads = torch.split(layer.positions, list(layer.counts))
        mine = list(heads[row * layer._heads : (row + 1) * layer._heads])
    else:
        mine = list(layer.positions[row])
    return [[x - start for x in head.tolist() if x != NEVER] for head in mine]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Built once each."""
    return {}


def model_of(models: dict[str, Any], family: str) -> Any:
    if family not in models:
        models[family] = build(family)[0]
    return models[family]


def check_batch(model: Any, alone: Sequence[Inputs], recipe: str) -> None:
    """Answers, kept positions and reports of a batch are those of each prompt alone."""
    batch = together(alone)
    n = batch["input_ids"].shape[1]
    with compressing(model, recipe) as report:
        said = model.generate(**batch, **GREEDY)
    assert report.bytes_after < report.bytes_before
    for row, inputs in enumerate(alone):
        own = inputs["input_ids"].shape[1]
        with compressing(model, recipe) as expected:
            single = model.generate(**inputs, **GREEDY)
        assert said.sequences[row, n:].tolist() == single.sequences[0, own:].tolist()
        assert report.sequences[row] == expected.sequences[0]
        for ours, theirs in zip(said.past_key_values.layers, single.past_key_values.layers, strict=True):
            assert positions(ours, row, n - own) == positions(theirs, 0, 0)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "gemma3", "qwen2"])
def test_a_batch_is_its_prompts_alone(models: dict[str, Any], family: str, recipe: str) -> None:
    check_batch(model_of(models, family), prompts(family), recipe)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma2", "gpt_oss", "mistral", "gpt_neox"])
def test_a_batch_of_other_families(models: dict[str, Any], family: str) -> None:
    """Soft caps, sink logits, sliding windows, interleaved M-RoPE, partial rotation."""
    check_batch(model_of(models, family), prompts(family), "snapkv@0.4,window=4")


@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_eager_models_answer_alike(models: dict[str, Any], family: str) -> None:
    model = model_of(models, family)
    use(model, "eager")
    try:
        check_batch(model, prompts(family), "vlcache@0.4,budget=sparsity")
        assert text_config(model)._attn_implementation == "eager"
    finally:
        use(model, "sdpa")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "gemma3", "qwen2"])
def test_keeping_everything_is_stock_generation(models: dict[str, Any], family: str, attention: str) -> None:
    """Also with more padding than the longest prompt needs."""
    model, batch = model_of(models, family), together(prompts(family), extra=3)
    use(model, attention)
    try:
        stock = model.generate(**batch, **GREEDY).sequences
        with compressing(model, "full") as report:
            assert model.generate(**batch, **GREEDY).sequences.tolist() == stock.tolist()
    finally:
        use(model, "sdpa")
    assert [x.prompt_tokens for x in report.sequences] == batch["attention_mask"].sum(1).tolist()
    assert report.bytes_after * (max(x.prompt_tokens for x in report.sequences) + 3) == report.bytes_before * max(
        x.kept[0] for x in report.sequences
    )


def test_memory_holds_the_longest_sequence_of_each_layer(models: dict[str, Any]) -> None:
    model, batch = model_of(models, "qwen2"), together(prompts("qwen2"))
    n = batch["input_ids"].shape[1]
    for recipe, kind in (("vlcache@0.3,budget=sparsity", KeptLayer), ("snapkv@0.3,window=4,budget=head", RaggedLayer)):
        with compressing(model, recipe) as report, torch.no_grad():
            past = model(**batch, past_key_values=DynamicCache()).past_key_values
        entry = 2 * 8 * 4
        assert report.bytes_before == 3 * n * 3 * 2 * entry
        stored = 0
        for index, layer in enumerate(past.layers):
            assert type(layer) is kind
            kept = [x.kept_per_head[index] for x in report.sequences]
            counts = [count for heads in kept for count in heads]
            entries = sum(counts) if kind is RaggedLayer else 6 * max(counts)
            for tensor in (layer.keys, layer.values):
                assert tensor.untyped_storage().nbytes() == tensor.nbytes == entries * entry // 2
            stored += entries * entry
        assert report.bytes_after == stored


def test_a_report_of_several_prompts_names_them(models: dict[str, Any]) -> None:
    model = model_of(models, "qwen2")
    with compressing(model, "knorm@0.5", question_tokens=3) as report:
        assert (report.prompt_tokens, report.kept, report.kept_per_head) == (0, (), ())
        model.generate(**together(prompts("qwen2")), max_new_tokens=1)
        assert [x.kept for x in report.sequences] == [(6, 6, 6), (9, 9, 9), (22, 22, 22)]
        with pytest.raises(InputError, match=r"3 prompts; look at each in report\.sequences"):
            _ = report.kept
        model.generate(**prompts("qwen2")[0], max_new_tokens=1)
    assert (report.prompt_tokens, report.kept) == (12, (6, 6, 6))


def test_prompts_of_a_batch_are_those_alone(models: dict[str, Any]) -> None:
    """Layouts with grids and positions, whether positions are given or not."""
    model, alone = model_of(models, "qwen2_vl"), prompts("qwen2_vl")
    batch = together(alone)
    given = model._prepare_position_ids_for_generation(batch["input_ids"], dict(batch))
    for inputs in (batch, {**batch, "position_ids": given}):
        for found, expected in zip(prompts_of(model, inputs), alone, strict=True):
            ours, theirs = layout_of(model, found), layout_of(model, expected)
            assert (ours.token_ids == theirs.token_ids).all()
            assert (ours.positions == theirs.positions).all()
            assert (ours.role == theirs.role).all()
            assert (ours.grids, ours.rope_delta) == (theirs.grids, theirs.rope_delta)


def further(said: Any, mask: torch.Tensor, new: torch.Tensor, inputs: Inputs) -> Inputs:
    """The next turn: everything so far, then ``new`` ``[b, k]``."""
    ids = torch.cat([said.sequences, new], dim=1)
    longer = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    turn = {"input_ids": ids, "attention_mask": longer, "past_key_values": said.past_key_values}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            turn[name] = torch.nn.functional.pad(inputs[name], (0, ids.shape[1] - mask.shape[1]))
    return turn


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava", "gemma3", "qwen2"])
def test_further_turns_are_stock_generation(models: dict[str, Any], family: str, count: int) -> None:
    """With everything kept: two more turns of three new tokens each, another batch in between."""
    model, alone = model_of(models, family), prompts(family)
    batch = together(alone[:count])
    new = torch.stack([words(3) for _ in range(2 * count)]).view(2, count, 3)

    def talk(between: bool) -> list[int]:
        said = model.generate(**batch, **GREEDY)
        for turn in new:
            if between:
                model.generate(**together(alone[::-1][:count]), **GREEDY)
            said = model.generate(**further(said, batch["attention_mask"], turn, batch), **GREEDY)
        return said.sequences.tolist()

    stock = talk(between=False)
    with compressing(model, "full"):
        assert talk(between=False) == stock
        assert talk(between=True) == stock


@pytest.mark.parametrize("recipe", ["vlcache@0.4,budget=sparsity", "snapkv@0.4,window=4,budget=head"])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "gemma3", "qwen2"])
def test_further_turns_of_a_batch_are_those_alone(models: dict[str, Any], family: str, recipe: str) -> None:
    """On layers of unequal length; the new tokens of the batch are padded too."""
    model, alone = model_of(models, family), prompts(family)[:2]
    batch, new = together(alone), [words(2), words(5)]
    padded = torch.stack([torch.nn.functional.pad(x, (5 - len(x), 0)) for x in new])
    with compressing(model, recipe) as report:
        said = model.generate(**batch, **GREEDY)
        before = report.sequences
        turn = further(said, batch["attention_mask"], padded, batch)
        turn["attention_mask"][0, -5:-2] = 0
        again = model.generate(**turn, **GREEDY)
        assert report.sequences == before
        for row, (inputs, more) in enumerate(zip(alone, new, strict=True)):
            first = model.generate(**inputs, **GREEDY)
            mask = torch.ones_like(inputs["input_ids"])
            single = model.generate(**further(first, mask, more[None], inputs), **GREEDY)
            if family == "gemma3" and row == 0:
                continue  # Sliding windows count padding between tokens, here as in any Transformers cache.
            assert again.sequences[row, -5:].tolist() == single.sequences[0, -5:].tolist()


@pytest.mark.parametrize("recipe", ["vlcache@0.4,budget=sparsity", "snapkv@0.4,window=4,budget=head|int8"])
def test_a_finished_sequence_waits_for_the_others(models: dict[str, Any], recipe: str) -> None:
    """It is fed padding meanwhile, which changes nothing for the next one."""
    model, alone = model_of(models, "qwen2"), prompts("qwen2")
    longer = {**GREEDY, "max_new_tokens": 8}
    with compressing(model, recipe):
        free = model.generate(**together(alone), **longer).sequences
        n = free.shape[1] - 8
        end = int(free[0, n + 1])
        said = model.generate(**together(alone), **{**longer, "eos_token_id": end, "pad_token_id": 0}).sequences
    for row in range(3):
        answer = free[row, n:].tolist()
        stop = answer.index(end) + 1 if end in answer else 8
        assert said[row, n : n + stop].tolist() == answer[:stop]
        assert not said[row, n + stop :].any()


@pytest.mark.parametrize("recipe", ["full", "vlcache@0.4,budget=sparsity", "snapkv@0.4,window=4,budget=head"])
@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "qwen2"])
def test_beams(models: dict[str, Any], family: str, recipe: str) -> None:
    """Each prompt of a batch finds what it finds alone; keeping everything, what stock Transformers finds."""
    model, alone = model_of(models, family), prompts(family)
    wanted = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    batch = together(alone)
    with compressing(model, recipe) as report:
        said = model.generate(**batch, **wanted).sequences
        assert len(report.sequences) == 9
        for row, inputs in enumerate(alone):
            expected = model.generate(**inputs, **wanted).sequences[:, -5:]
            assert said[2 * row : 2 * row + 2, -5:].tolist() == expected.tolist()
    if recipe == "full":
        assert said.tolist() == model.generate(**batch, **wanted).sequences.tolist()


def test_several_answers_to_one_prompt(models: dict[str, Any]) -> None:
    model, inputs = model_of(models, "qwen2"), prompts("qwen2")[0]
    wanted = {"max_new_tokens": 5, "do_sample": True, "num_return_sequences": 3, "eos_token_id": -1}
    torch.manual_seed(0)
    stock = model.generate(**inputs, **wanted)
    torch.manual_seed(0)
    with compressing(model, "full"):
        assert model.generate(**inputs, **wanted).tolist() == stock.tolist()
    assert len({tuple(x) for x in stock.tolist()}) > 1


def test_other_attention_is_replaced_meanwhile(models: dict[str, Any]) -> None:
    """A model that was loaded with another attention, such as FlashAttention, gets it back afterwards."""
    model, inputs = model_of(models, "qwen2"), prompts("qwen2")[1]
    calls = []

    def other(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    with compressing(model, "vlcache@0.4"):
        expected = model.generate(**inputs, **GREEDY).sequences.tolist()
    AttentionInterface.register("other_attention", other)
    use(model, "other_attention")
    try:
        with compressing(model, "vlcache@0.4"):
            assert model.generate(**inputs, **GREEDY).sequences.tolist() == expected
        assert not calls
        model.generate(**inputs, **GREEDY)
        assert calls
    finally:
        use(model, "sdpa")


def test_padding_elsewhere_is_refused(models: dict[str, Any]) -> None:
    model, batch = model_of(models, "qwen2"), together(prompts("qwen2"))
    mask = batch["attention_mask"]
    hole = mask.clone()
    hole[2, 7] = 0
    for wrong in (mask.flip(1), hole, torch.zeros_like(mask)):
        with pytest.raises(InputError, match="padded on the left"), compressing(model, "knorm@0.5"):
            model.generate(batch["input_ids"], attention_mask=wrong, max_new_tokens=1)
    with pytest.raises(InputError, match="input_ids"):
        prompts_of(model, {})


def test_wrong_further_turns_are_refused(models: dict[str, Any]) -> None:
    model, (inputs, *_) = model_of(models, "gemma3"), prompts("gemma3")
    ones = torch.ones_like(inputs["input_ids"])
    with compressing(model, "knorm@0.5"):
        said = model.generate(**inputs, **GREEDY)
        past, new = said.past_key_values, torch.tensor([[5, IMAGE, IMAGE]])
        turn = further(said, ones, new, inputs)
        turn["token_type_ids"][:, -2:] = 1
        with pytest.raises(UnsupportedModelError, match="see each other"):
            model.generate(**turn, **GREEDY)
        with pytest.raises(InputError, match="must cover all"):
            model(new, attention_mask=torch.ones_like(new), past_key_values=past)
        with pytest.raises(InputError, match="need input_ids"):
            model(inputs_embeds=torch.zeros(1, 1, 32), past_key_values=past)
        with pytest.raises(UnsupportedModelError, match="rolled back"):
            past.crop(-1)


def test_a_further_turn_with_a_new_picture(models: dict[str, Any]) -> None:
    """Where tokens of a picture see only the past, as in LLaVA, it is read as stock Transformers reads it."""
    model, (inputs, *_) = model_of(models, "llava"), prompts("llava")
    new = torch.cat([words(2), torch.full((16,), IMAGE), words(3)])[None]
    pixels, ones = torch.randn(1, 3, 16, 16), torch.ones_like(inputs["input_ids"])

    def talk() -> list[int]:
        said = model.generate(**inputs, **GREEDY)
        turn = further(said, ones, new, inputs)
        return model.generate(**turn, pixel_values=pixels, **GREEDY).sequences.tolist()

    stock = talk()
    with compressing(model, "full"):
        assert talk() == stock
    assert END not in stock[0]


def test_a_manual_loop_over_a_batch(models: dict[str, Any]) -> None:
    """Without positions from ``generate()``, M-RoPE's are those of the batch at hand, not of the last one."""
    model, alone = model_of(models, "qwen2_vl"), prompts("qwen2_vl")[:2]
    batch, new = together(alone), torch.stack([words(2), words(2)])
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
    got = []
    for between in (False, True):
        with compressing(model, "full"), torch.no_grad():
            past = model(**batch, past_key_values=DynamicCache()).past_key_values
            if between:
                model.generate(**prompts("qwen2_vl")[2], **GREEDY)
            got.append(model(new, attention_mask=mask, past_key_values=past).logits)
    longer = {**batch, "input_ids": torch.cat([batch["input_ids"], new], 1), "attention_mask": mask}
    longer["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 2))
    with torch.no_grad():
        expected = model(**longer).logits[:, -2:]
    for logits in got:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recipe", ["vlcache@0.4,budget=sparsity", "snapkv@0.4,window=4,budget=head"])
def test_sequences_of_a_kept_cache_are_picked_and_repeated(models: dict[str, Any], recipe: str) -> None:
    model, batch = model_of(models, "qwen2"), together(prompts("qwen2"))
    with compressing(model, recipe), torch.no_grad():
        past = model(**batch, past_key_values=DynamicCache()).past_key_values
    before = [[positions(layer, row, 0) for row in range(3)] for layer in past.layers]
    for layer, rows in zip(past.layers, before, strict=True):
        layer.batch_repeat_interleave(2)
        layer.batch_select_indices(torch.tensor([5, 0, 1]))
        assert [positions(layer, row, 0) for row in range(3)] == [rows[2], rows[0], rows[0]]
        with session(Session(kept=past.layers)):
            keys, _ = layer.update(torch.ones(3, 2, 1, 8), torch.ones(3, 2, 1, 8))
        assert keys.shape[:2] == (3, 2)
