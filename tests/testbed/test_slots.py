"""What training computes is what the shipped model computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvferry.testbed.build import SIZES, build_image_processor, build_model, build_tokenizer
from kvferry.testbed.data import sample
from kvferry.testbed.joint import tower_features
from kvferry.testbed.language import Task, answer_logits, draw_questions
from kvferry.testbed.pixels import grids, patches
from kvferry.testbed.slots import collate, encode, pack
from kvferry.testbed.words import IMAGE_PAD, VOCABULARY


@pytest.mark.parametrize("kind", ["colour", "pair"])
def test_slot_logits_are_the_plain_prompts_logits(kind: str) -> None:
    """One picture (a colour question's) and two pictures (a pair's): every slot equals its lone prompt."""
    torch.manual_seed(0)
    model = build_model(SIZES["edge"], seed=1).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.mul_(15)
    drawn = sample("train", 0, kinds=[kind])
    questions = draw_questions(np.random.default_rng(0), drawn.scenes, Task(slots=5))
    with torch.no_grad():
        batch = collate([pack(drawn.scenes, questions, guided=True)], [[q.kind for q in questions]])
        features = torch.cat([tower_features(model, [scene]) for scene in drawn.scenes])
        slots = answer_logits(model, batch, features)
        tokenizer = build_tokenizer()
        pictures = build_image_processor()(drawn.images, return_tensors="pt")
        before = 0
        for question in questions:
            content = [{"type": "image"} for _ in drawn.images] + [{"type": "text", "text": question.text}]
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            head, *rest = text.split(IMAGE_PAD)
            pads = [IMAGE_PAD * int(grid.prod() // 4) for grid in pictures["image_grid_thw"]]
            text = head + "".join(p + r for p, r in zip(pads, rest, strict=True)) + question.answer
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            plain = model(input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).int(), **pictures)
            length = len(encode(question.answer)) + 1
            torch.testing.assert_close(slots[before : before + length], plain.logits[0, -length:], atol=2e-4, rtol=2e-4)
            before += length
    assert slots.std() > 0.1


def test_training_pixels_are_the_processors() -> None:
    drawn = sample("train", 11)
    first = [drawn.images[0]]
    reference = build_image_processor()(first, return_tensors="pt")
    torch.testing.assert_close(patches(first), reference["pixel_values"], atol=1e-5, rtol=1e-5)
    assert torch.equal(grids(first), reference["image_grid_thw"])


def test_encode_agrees_with_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    for index in range(26):
        drawn = sample("train", index)
        for text in (drawn.question, drawn.answer):
            assert tokenizer(text)["input_ids"] == encode(text), text
    assert len(set(VOCABULARY)) == len(VOCABULARY)
