"""Messages as Transformers has them become the same prompt, and nothing of them is lost."""

from __future__ import annotations

import base64
import io
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image

import kvferry
from kvferry import VLM, InputError, UnsupportedModelError
from kvferry.cache import Role
from kvferry.messages import Messages
from tests.models.families import build
from tests.models.test_vlm import words_tokenizer

SYSTEM = {"role": "system", "content": "note says red"}
ROUNDS = "{{ bos_token }}{% for m in messages %}"
PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}PICTURE{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
)
TEMPLATE = ROUNDS + "{{ m['role'] | upper }} : " + PARTS + "{{ '\n' }}{% endfor %}ASSISTANT :"


def conversation(*pictures: Any) -> list[dict[str, Any]]:
    first, second = pictures
    return [
        SYSTEM,
        {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": "what is red ?"}]},
        {"role": "assistant", "content": "the circle"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "is the "},
                {"type": "image", "image": second},
                {"type": "text", "text": "circle what colour ?"},
            ],
        },
    ]


def llava() -> tuple[VLM, Any]:
    tokenizer = words_tokenizer("<image>")
    processor = tf.LlavaProcessor(
        tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE.replace("PICTURE", "<image>"),
    )
    model, _ = build("llava")
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    return VLM(model, processor=processor), processor


def gemma3() -> tuple[VLM, Any]:
    tokenizer = words_tokenizer("<soft>", "<boi>", "<eoi>")
    for name, token in (("image", "<soft>"), ("boi", "<boi>"), ("eoi", "<eoi>")):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    processor = tf.Gemma3Processor(
        tf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16}),
        tokenizer,
        chat_template=TEMPLATE.replace("PICTURE", "<boi>"),
        image_seq_length=4,
    )
    model, _ = build("gemma3")
    model.config.image_token_id = tokenizer.image_token_id
    return VLM(model, processor=processor), processor


@pytest.mark.parametrize("make", [llava, gemma3])
def test_the_prompt_is_transformers_own(make: Any, picture: Image.Image) -> None:
    vlm, processor = make()
    messages = conversation(picture, picture.rotate(90))
    theirs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ours = vlm.prefill(messages=messages)
    layout = ours.cache.layout
    assert layout.token_ids.tolist() == theirs["input_ids"][0].tolist()
    theirs.pop("attention_mask", None)
    with torch.no_grad():
        logits = vlm.model(**theirs).logits[0, -1]
    torch.testing.assert_close(ours.next_logits, logits.float(), rtol=1e-4, atol=1e-4)
    words = vlm.tokenizer.convert_ids_to_tokens(layout.token_ids.tolist())
    asked = [word for word, it in zip(words, layout.question, strict=True) if it]
    assert asked == ["is", "the", "circle", "what", "colour", "?"]
    context = (layout.role == Role.CONTEXT) & ~layout.visual
    told = [word for word, it in zip(words, context, strict=True) if it]
    assert told == ["note", "says", "red", "what", "is", "red", "?", "the", "circle"]
    assert vlm.answer(ours, max_new_tokens=3) == vlm.answer(ours.cache, max_new_tokens=3)
    assert vlm.resume(ours, max_new_tokens=2, keep=True).cache is not None


def test_pictures_stand_in_their_order(picture: Image.Image) -> None:
    vlm, _ = llava()
    dark = Image.new("RGB", (16, 16))
    one, other = (vlm.prefill(messages=conversation(*pair)).next_logits for pair in ((picture, dark), (dark, picture)))
    assert not torch.allclose(one, other)
    bare = conversation(None, None)
    for message in bare:
        if isinstance(message["content"], list):
            message["content"] = [{k: v for k, v in part.items() if v is not None} for part in message["content"]]
    torch.testing.assert_close(vlm.prefill([picture, dark], messages=bare).next_logits, one)


def test_a_shipped_model(picture: Image.Image) -> None:
    """Qwen2-VL's own template writes a system prompt of its own where there is none."""
    vlm = kvferry.load("testbed/edge", dtype="float32")
    messages = conversation(picture, picture.rotate(90))
    text = vlm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    layout = vlm.prefill(messages=messages).cache.layout
    ids = [token for token, run in groupby(layout.token_ids.tolist())]  # a picture is one run
    assert ids == [token for token, run in groupby(vlm.tokenizer(text)["input_ids"])]
    alone = vlm.prefill([picture], "how many shapes are there?").cache
    single = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many shapes are there?"}]},
    ]
    same = vlm.prefill([picture], messages=single).cache
    assert same.layout.token_ids.tolist() == alone.layout.token_ids.tolist()
    assert same.layout.role.tolist() == alone.layout.role.tolist()
    recipe = "snapkv@0.5|int8"
    asked = vlm.prefill(messages=messages, recipe=recipe)
    assert vlm.answer(kvferry.decompress(kvferry.compress(asked, recipe)))


def test_text_alone() -> None:
    tokenizer = words_tokenizer()
    tokenizer.chat_template = TEMPLATE
    vlm = VLM(build("llama")[0], tokenizer)
    messages = [SYSTEM, {"role": "user", "content": "what colour is the circle ?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert vlm.prefill(messages=messages).cache.layout.token_ids.tolist() == ids
    parts = [SYSTEM, {"role": "user", "content": [{"type": "text", "text": "what colour is the circle ?"}]}]
    assert vlm.prefill(messages=parts).cache.layout.token_ids.tolist() == ids
    with pytest.raises(InputError, match="reads text only"):
        vlm.prefill(messages=conversation(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.uint8)))


USER = {"role": "user", "content": "what colour ?"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ROUNDS + "{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}x{% endfor %}",
         r"takes no messages of system, user \(no system here\)"),
        (ROUNDS + "{% if m['role'] != 'system' %}" + PARTS + "{% endif %}{% endfor %}", r"leaves out.*message 1"),
        ("{{ messages[-1]['content'] }}", r"leaves out or rewrites message 1 \(system\)"),
        (ROUNDS + "{{ m['content'] | replace('red', '') }}{% endfor %}", r"rewrites message 1 \(system\)"),
        (None, r"leaves out or rewrites message 1 \(system\)"),
    ],
)  # fmt: skip
def test_what_a_template_loses_is_refused(template: str | None, expected: str) -> None:
    tokenizer = words_tokenizer()
    tokenizer.chat_template = template
    vlm = VLM(build("llama")[0], tokenizer)
    with pytest.raises(UnsupportedModelError, match=expected):
        vlm.prefill(messages=[SYSTEM, USER])
    if template is None:
        text = vlm.prefill(messages=[USER, {"role": "assistant", "content": "red"}, USER]).cache.layout
        assert vlm.tokenizer.decode(text.token_ids).count("what colour") == 2


def test_a_picture_that_a_template_loses(picture: Image.Image) -> None:
    vlm, processor = llava()
    processor.chat_template = TEMPLATE.replace("PICTURE", "{% if m['role'] == 'user' %}<image>{% endif %}")
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "red"}]}, USER,
    ]  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=r"no place for a picture in message 1 \(system\)"):
        vlm.prefill(messages=messages)


IMAGE = {"type": "image"}
TEXT = {"type": "text", "text": "what?"}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "one message at least"),
        ("what?", "messages are a list"),
        ([{"role": "tool", "content": "x"}], "the role 'tool'"),
        ([{"content": "x"}], "the role None"),
        (["x"], "message 1 is a str"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": " "}], "empty text"),
        ([{**USER, "tool_calls": [1]}], "tool_calls, which would be lost"),
        ([USER, {"role": "assistant", "content": "red"}], "end with what the user asks"),
        ([{"role": "user", "content": [IMAGE | {"path": "a.png"}]}], "asks nothing"),
        ([{"role": "user", "content": [IMAGE, TEXT]}], "none is left of images"),
        ([{"role": "user", "content": [IMAGE | {"path": "a", "url": "b"}, TEXT]}], "not in path and url"),
        ([{"role": "user", "content": [IMAGE | {"path": "a", "max_pixels": 3}, TEXT]}], "max_pixels of"),
        ([{"role": "user", "content": [{"type": "video", "path": "a"}, TEXT]}], "a part 'video'"),
        ([{"role": "user", "content": [IMAGE | {"base64": "?"}, TEXT]}], "is not base64"),
        ([{"role": "user", "content": [IMAGE | {"url": "http://127.0.0.1:1/a.png"}, TEXT]}], "cannot be fetched"),
    ],
)
def test_refused(messages: Any, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        Messages.parse(messages)
    with pytest.raises(InputError, match="2 pictures for 0 places"):
        Messages.parse([USER], images=["a", "b"])


def test_where_pictures_may_be(tmp_path: Path, picture: Image.Image) -> None:
    file = io.BytesIO()
    picture.save(file, "PNG")
    (tmp_path / "a.png").write_bytes(file.getvalue())
    text = base64.b64encode(file.getvalue()).decode()
    parts = [
        {"path": "a.png"}, {"image": "a.png"}, {"url": f"file://{tmp_path}/a.png"}, {"base64": text},
        {"url": f"data:image/png;base64,{text}"}, {"image_url": {"url": f"data:image/png;base64,{text}"}},
    ]  # fmt: skip
    content = [IMAGE | part for part in parts] + [TEXT]
    path = tmp_path / "said.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": content}]}))
    said = Messages.read(path)
    assert [np.asarray(kvferry.pictures.open_picture(x)).shape for x in said.images] == [(192, 208, 3)] * 6
    assert said.single
    assert said.question == "what?"
    path.write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        Messages.read(path)
    with pytest.raises(InputError, match="cannot read"):
        Messages.read(tmp_path / "nowhere.json")


def test_words_of_the_template_in_a_message(picture: Image.Image) -> None:
    vlm, _ = llava()
    with pytest.raises(InputError, match=r"the text of message 1 contains the template token '<image>'"):
        vlm.prefill(messages=[{"role": "system", "content": "<image> red"}, USER])
    with pytest.raises(InputError, match="messages hold the question"):
        vlm.prefill(question="what?", messages=[USER])
