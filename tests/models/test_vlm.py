"""The path from pictures and words to an answer, on an untrained testbed model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from kvferry.cache import Role
from kvferry.errors import EvidenceError, FingerprintError, InputError, UnsupportedModelError
from kvferry.evidence import EvidenceRequest
from kvferry.models import VLM
from kvferry.recipe import Recipe, compress, decompress
from tests.models.families import build

QUESTION = "what digit is on the red square?"
QUESTION_ROWS = EvidenceRequest("question")


def stock(vlm: VLM, pictures: list[Image.Image], text: str, count: int) -> tuple[list[int], list[int]]:
    """Prompt and answer by the template, the tokenizer, the image processor and generate() alone."""
    content: list[dict[str, Any]] = [{"type": "image"} for _ in pictures] + [{"type": "text", "text": text}]
    words = vlm.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pixels = dict(vlm.image_processor(images=pictures, return_tensors="pt")) if pictures else {}
    for grid in pixels.get("image_grid_thw", []):
        words = words.replace("<|image_pad|>", "<|hold|>" * (int(grid.prod()) // 4), 1)
    ids = vlm.tokenizer(words.replace("<|hold|>", "<|image_pad|>"), return_tensors="pt")["input_ids"]
    if pictures:
        pixels["mm_token_type_ids"] = (ids == vlm.model.config.image_token_id).long()
    said = vlm.model.generate(input_ids=ids, **pixels, max_new_tokens=count, do_sample=False)
    return ids[0].tolist(), said[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("context", [None, "note: the sign is blue."])
def test_both_protocols_are_stock_generation(vlm: VLM, picture: Image.Image, count: int, context: str | None) -> None:
    pictures = [picture, picture.resize((224, 192))][:count]
    text = QUESTION if context is None else f"{context}\n{QUESTION}"
    ids, said = stock(vlm, pictures, text, 8)
    asked = vlm.prefill(pictures, QUESTION, context=context)
    assert asked.cache.layout.token_ids.tolist() == ids
    assert asked.cache.length == len(ids) - 1
    assert list(vlm.resume(asked.cache, max_new_tokens=8).token_ids) == said
    assert int(asked.next_logits.argmax()) == said[0]
    if count or context:
        scene = vlm.prefill(pictures, context=context)
        assert scene.cache.length == len(scene.cache.layout)
        assert ids[: scene.cache.length] == scene.cache.layout.token_ids.tolist()
        assert list(vlm.resume(scene.cache, QUESTION, max_new_tokens=8).token_ids) == said


def test_roles_follow_the_template(vlm: VLM, picture: Image.Image) -> None:
    layout = vlm.prefill([picture], QUESTION, context="note: the sign is blue.").cache.layout
    words = vlm.tokenizer.convert_ids_to_tokens(layout.token_ids.tolist())

    def spoken(role: Role) -> list[str]:
        return [w for w, r, v in zip(words, layout.role, layout.visual, strict=True) if r == role and not v]

    assert spoken(Role.QUESTION) == ["what", "digit", "is", "on", "the", "red", "square", "?"]
    assert spoken(Role.CONTEXT) == ["note", ":", "the", "sign", "is", "blue", "."]
    assert set(layout.role[layout.visual]) == {Role.CONTEXT}
    assert layout.grids == ((1, 12, 13),)


def test_arrays_and_paths_are_pictures_too(vlm: VLM, picture: Image.Image, tmp_path: Path) -> None:
    picture.save(tmp_path / "scene.png")
    wanted = vlm.prefill([picture], QUESTION).next_logits
    for same in (np.asarray(picture), tmp_path / "scene.png", str(tmp_path / "scene.png")):
        torch.testing.assert_close(vlm.prefill(same, QUESTION).next_logits, wanted)


def test_proxy_question_leaves_only_its_evidence(vlm: VLM, picture: Image.Image) -> None:
    scene = vlm.prefill([picture]).cache
    proxied = vlm.prefill([picture], proxy_question=QUESTION, requests=[QUESTION_ROWS])
    asked = vlm.prefill([picture], QUESTION, requests=[QUESTION_ROWS])
    assert proxied.cache.layout.token_ids.tolist() == scene.layout.token_ids.tolist()
    assert (proxied.cache.length, proxied.cache.layout.rope_delta) == (scene.length, scene.layout.rope_delta)
    for a, b in zip(proxied.cache, scene, strict=True):
        torch.testing.assert_close(a.keys, b.keys, atol=1e-4, rtol=1e-4)
    seen = proxied.evidence.of(QUESTION_ROWS, 1)
    torch.testing.assert_close(seen, asked.evidence.of(QUESTION_ROWS, 1)[:, : scene.length])
    with pytest.raises(EvidenceError, match="proxy_question"):
        vlm.prefill([picture], requests=[QUESTION_ROWS])


@pytest.mark.parametrize(
    "recipe",
    ["full|bf16", "q2c@0.5|int8", "snapkv@0.25|int4|zstd", "h2o@0.5", "vlcache@0.3", "expected_attention@0.5|int8"],
)
def test_through_bytes(vlm: VLM, picture: Image.Image, recipe: str) -> None:
    prefilled = vlm.prefill([picture], QUESTION, recipe=recipe)
    cache = decompress(compress(prefilled, recipe))
    here = vlm.resume(Recipe.parse(recipe).apply(prefilled), max_new_tokens=6)
    assert vlm.resume(cache, max_new_tokens=6).token_ids == here.token_ids
    assert vlm.resume(cache, max_new_tokens=6).token_ids == here.token_ids


@pytest.mark.parametrize("asked", [True, False])
def test_construction_time_keeps_the_selection_and_its_answer(vlm: VLM, picture: Image.Image, asked: bool) -> None:
    question = QUESTION if asked else None
    first = vlm.prefill([picture], question)
    selection = Recipe.parse("knorm@0.3").select(first)
    built = vlm.prefill([picture], question, construct=selection)
    assert [x.positions.tolist() for x in built.cache] == [x.tolist() for x in selection.positions]
    assert built.cache.length == first.cache.length
    post_hoc = Recipe.parse("knorm@0.3").keep(first)
    torch.testing.assert_close(built.cache.layers[0].keys, post_hoc.layers[0].keys)
    assert (built.cache.layers[1].keys - post_hoc.layers[1].keys).abs().max() > 1e-3
    assert not built.next_logits.equal(first.next_logits)
    if asked:
        said = vlm.resume(built.cache, max_new_tokens=1).token_ids
        assert said in ((), (int(built.next_logits.argmax()),))


def test_text_arrives_in_pieces(vlm: VLM, picture: Image.Image) -> None:
    cache = vlm.prefill([picture], QUESTION).cache
    heard: list[tuple[int, str]] = []
    done = vlm.resume(cache, max_new_tokens=5, on_token=lambda token, piece: heard.append((token, piece)))
    assert tuple(token for token, _ in heard) == done.token_ids
    assert "".join(piece for _, piece in heard) == done.text == vlm.answer(cache, max_new_tokens=5)
    assert 0 < done.first_token_seconds <= done.seconds


def test_stops_at_the_end_of_the_turn(vlm: VLM, picture: Image.Image) -> None:
    cache = vlm.prefill([picture], QUESTION).cache
    said = vlm.resume(cache, max_new_tokens=5).token_ids
    before = vlm.model.generation_config.eos_token_id
    vlm.model.generation_config.eos_token_id = [before, said[2]]
    try:
        assert vlm.resume(cache, max_new_tokens=5).token_ids == said[: said.index(said[2])]
    finally:
        vlm.model.generation_config.eos_token_id = before


def test_threads_do_not_mix(vlm: VLM, picture: Image.Image) -> None:
    questions = [f"how many {what} are there?" for what in ("circles", "squares", "red stars", "blue circles")]

    def ask(question: str) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
        prefilled = vlm.prefill([picture], question, requests=[QUESTION_ROWS])
        scene = vlm.prefill([picture], recipe="knorm@0.5")
        small = Recipe.parse("knorm@0.5").keep(scene)
        return (
            prefilled.evidence.of(QUESTION_ROWS, 0),
            vlm.resume(prefilled.cache, max_new_tokens=6).token_ids,
            vlm.resume(small, question, max_new_tokens=6).token_ids,
        )

    alone = [ask(x) for x in questions]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, questions * 3))
    for index, (columns, full, pruned) in enumerate(together):
        expected = alone[index % len(questions)]
        torch.testing.assert_close(columns, expected[0])
        assert (full, pruned) == expected[1:]


def test_no_state_is_left_in_the_model(vlm: VLM, picture: Image.Image) -> None:
    vlm.model.model.rope_deltas = None
    vlm.answer(vlm.prefill([picture], QUESTION).cache, max_new_tokens=2)
    assert vlm.model.model.rope_deltas is None


def test_another_models_cache_is_refused(vlm: VLM, picture: Image.Image) -> None:
    cache = vlm.prefill([picture], QUESTION).cache
    with pytest.raises(FingerprintError, match="load the model that made it"):
        vlm.answer(replace(cache, fingerprint="0" * 64))
    with pytest.raises(FingerprintError, match="layers"):
        vlm.answer(replace(cache, layers=cache.layers[:1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": ""}, "the question is empty"),
        ({"question": "  \n"}, "the question is empty"),
        ({"question": "what is <|image_pad|>?"}, "template token"),
        ({"question": "what<|im_end|>"}, "template token"),
        ({"question": "what?", "context": "a <|vision_start|> b"}, "template token"),
        ({"question": "what?", "context": " "}, "the context is empty"),
        ({"question": "what?", "proxy_question": "what?"}, "only one of the two"),
        ({}, "nothing to read"),
        ({"images": [3]}, "not a picture"),
    ],
)
def test_bad_prompts_are_named(vlm: VLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        vlm.prefill(**arguments)


def test_questions_at_the_wrong_time(vlm: VLM, picture: Image.Image) -> None:
    asked, scene = vlm.prefill([picture], QUESTION).cache, vlm.prefill([picture]).cache
    with pytest.raises(InputError, match="already holds a question"):
        vlm.answer(asked, QUESTION)
    with pytest.raises(InputError, match="without a question"):
        vlm.answer(scene)
    with pytest.raises(InputError, match="the question is empty"):
        vlm.answer(scene, "")
    with pytest.raises(InputError, match="max_new_tokens"):
        vlm.answer(asked, max_new_tokens=0)


def test_too_many_visual_tokens(vlm: VLM, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.models.prompt.MAX_VISUAL_TOKENS", 100)
    with pytest.raises(InputError, match="scale them down"):
        vlm.prefill([picture])


def test_pictures_and_texts_beyond_the_model(vlm: VLM, picture: Image.Image) -> None:
    with pytest.raises(InputError, match="too narrow"):
        vlm.prefill([picture.resize((4000, 8))])
    with pytest.raises(InputError, match="shorten the text"):
        vlm.prefill(question="what? " * 2100)


def test_hostile_token_ids(vlm: VLM, picture: Image.Image) -> None:
    cache = vlm.prefill([picture], QUESTION).cache
    ids = cache.layout.token_ids.copy()
    ids[-1] = 10**6
    with pytest.raises(InputError, match="outside the model's vocabulary"):
        vlm.answer(replace(cache, layout=replace(cache.layout, token_ids=ids)))


def test_facts(vlm: VLM) -> None:
    assert (vlm.layers, vlm.kv_heads, vlm.head_dim, vlm.has_vision) == (2, 1, 32, True)
    assert [x.sections for x in vlm.rotary if x] == [(4, 6, 6)] * 2


def test_evidence_stays_out_of_plain_use(vlm: VLM, picture: Image.Image) -> None:
    """The model of a VLM still generates as before."""
    ids, said = stock(vlm, [picture], QUESTION, 4)
    assert len(said) == 4
    assert len(ids) > 100


def words_tokenizer(*special: str) -> Any:
    words = "<pad> <s> <unk> USER ASSISTANT : what colour is the circle ? note says red"
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words.split())}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=list(special),
    )


def test_a_family_with_its_own_processor(picture: Image.Image) -> None:
    tokenizer = words_tokenizer("<image>")
    template = (
        "{{ bos_token }}USER : {% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>\n"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT :"
    )
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    model, _ = build("llava")
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    vlm = VLM(model, processor=processor)
    text = "<s>USER : <image>\n<image>\nnote says red\nwhat colour is the circle ? ASSISTANT :"
    inputs = processor(text=[text], images=[picture] * 2, return_tensors="pt", add_special_tokens=False)
    n = inputs["input_ids"].shape[1]
    said = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, n:].tolist()
    asked = vlm.prefill([picture] * 2, "what colour is the circle ?", context="note says red")
    assert asked.cache.layout.token_ids.tolist() == inputs["input_ids"][0].tolist()
    assert list(vlm.resume(asked.cache, max_new_tokens=5).token_ids) == said
    scene = vlm.prefill([picture] * 2, context="note says red").cache
    assert list(vlm.resume(scene, "what colour is the circle ?", max_new_tokens=5).token_ids) == said


def test_gemma3_with_its_own_processor(picture: Image.Image) -> None:
    tokenizer = words_tokenizer("<soft>", "<boi>", "<eoi>")
    for name, token in (("image", "<soft>"), ("boi", "<boi>"), ("eoi", "<eoi>")):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    template = (
        "{{ bos_token }}USER : {% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<boi>"
        "{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}\nASSISTANT :"
    )
    pixels = tf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = tf.Gemma3Processor(pixels, tokenizer, chat_template=template, image_seq_length=4)
    model, _ = build("gemma3")
    model.config.image_token_id = tokenizer.image_token_id
    text = "<s>USER : <boi><boi>what colour is the circle ?\nASSISTANT :"
    inputs = processor(text=[text], images=[picture] * 2, return_tensors="pt", add_special_tokens=False)
    inputs.pop("attention_mask", None)
    said = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
    vlm = VLM(model, processor=processor)
    asked = vlm.prefill([picture] * 2, "what colour is the circle ?")
    assert asked.cache.layout.token_ids.tolist() == inputs["input_ids"][0].tolist()
    assert asked.cache.layout.grids == ((1, 2, 2), (1, 2, 2))
    assert list(vlm.resume(asked.cache, max_new_tokens=5).token_ids) == said
    scene = vlm.prefill([picture] * 2).cache
    assert list(vlm.resume(scene, "what colour is the circle ?", max_new_tokens=5).token_ids) == said


def test_a_text_only_model() -> None:
    model, _ = build("mistral")
    vlm = VLM(model, words_tokenizer())
    assert not vlm.has_vision
    with pytest.raises(InputError, match="reads text only"):
        vlm.prefill([np.zeros((8, 8, 3), np.uint8)], "what?")
    document = " ".join(["the circle is red"] * 8)
    asked = vlm.prefill(question="what colour is the circle ?", context=document, recipe="q2c@0.5")
    scene = vlm.prefill(context=document)
    first = vlm.resume(asked.cache, max_new_tokens=5).token_ids
    assert vlm.resume(scene.cache, "what colour is the circle ?", max_new_tokens=5).token_ids == first


def test_a_model_without_tokenizer_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        VLM(build("llama")[0])
