"""Splits share no photograph and no scene; packed questions are plain questions."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from kvferry.models.load import load
from kvferry.testbed.build import CELL
from kvferry.testbed.data import SPLITS
from kvferry.testbed.pixels import patches
from kvferry.testbed.render import render
from kvferry.testbed.slots import collate
from kvferry.testbed.smol.build import write_folder
from kvferry.testbed.smol.data import SIGN_HEIGHTS, Lessons, Task, ask_in_english, draw, sample
from kvferry.testbed.smol.photographs import SOURCES, backdrop, photographs
from kvferry.testbed.smol.pupil import Pupil
from kvferry.testbed.tower import scene_grids


def test_no_photograph_is_in_two_splits() -> None:
    every = [source for sources in SOURCES.values() for source in sources]
    assert set(SOURCES) == set(SPLITS)
    assert len(every) == len(set(every))


@pytest.mark.parametrize("split", ["train", "calibration", "validation"])
def test_photographs_are_there_and_differ(split: str) -> None:
    assert len(photographs(split)) == len(SOURCES[split])
    rng = np.random.default_rng(0)
    crops = [backdrop(split, rng, 96, 64) for _ in range(3)]
    assert crops[0].shape == (64, 96, 3)
    assert crops[0].std() > 1
    assert not np.array_equal(crops[0], crops[1])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    photographs.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"the test split needs the photographs of \w+; run: make smol"):
        photographs("test")


def test_samples_are_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("colour", "pair", "caption", "text")
    one, again = (sample("validation", 3, kinds=kinds[:1]) for _ in range(2))
    assert (one.question, one.scenes) == (again.question, again.scenes)
    assert np.array_equal(one.images[0], again.images[0])
    assert sample("train", 3, kinds=kinds[:1]).scenes != one.scenes
    assert [len(sample("validation", index, kinds=kinds).images) for index in range(4)] == [1, 2, 1, 0]
    heights = {sign.height for seed in range(40) for sign in draw(np.random.default_rng(seed), 256, 256).signs}
    assert heights == set(SIGN_HEIGHTS)


@pytest.mark.parametrize("kind", ["colour", "pair", "text"])
def test_slot_logits_are_the_plain_prompts_logits(kind: str, pupil: Pupil, tmp_path: Path) -> None:
    """One picture, two and none: every packed question equals its lone prompt, template and processor included."""
    rng = np.random.default_rng(2)
    while True:
        scenes = [draw(rng, 160, 128), draw(rng, 160, 128)][: 1 + (kind == "pair")]
        questions = [q for _ in range(6) if (q := ask_in_english(rng, scenes, kind))]
        if len({q.text for q in questions}) >= 2:
            break
    with torch.no_grad():
        for name, weight in pupil.update.up.items():
            weight.normal_(std=0.05, generator=torch.Generator().manual_seed(len(name)))
        pupil.tower.merger.mlp[2].weight.mul_(3)
    shown = [] if kind == "text" else scenes
    pictures = [render(scene) for scene in shown]
    packed = pupil.prompts.pack([(scene.height // CELL, scene.width // CELL) for scene in shown], questions)
    batch = collate([packed], [[q.kind for q in questions]])
    with torch.no_grad():
        features = pupil.tower.merger.mlp[2](pupil.middle(patches(pictures), scene_grids(shown))) if shown else None
        slots = pupil.answers(batch, features).log_softmax(-1)
    write_folder(pupil.model, pupil.tokenizer, pupil.update, pupil.language, tmp_path / "grown")
    vlm = load(tmp_path / "grown")
    before = 0
    for question in questions:
        said = vlm.tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        asked = vlm.prefill(pictures, question.text).cache.layout.token_ids.tolist()
        inputs = {"input_ids": torch.tensor([[*asked, *said]])}
        if pictures:
            inputs |= vlm.image_processor(pictures, return_tensors="pt")
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == pupil.model.config.image_token_id).int()
        with torch.no_grad():
            plain = pupil.model(**inputs).logits[0, len(asked) - 1 :].log_softmax(-1)
        torch.testing.assert_close(slots[before : before + len(said) + 1], plain, atol=5e-4, rtol=5e-4)
        before += len(said) + 1
    assert before == len(slots)
    assert slots.std() > 1


def test_a_step_is_drawn_from_its_own_number(pupil: Pupil) -> None:
    task = Task(pictures=2, slots=6, sides=(128,), pairs=0.5, text=0.2)
    lessons = Lessons(pupil.prompts, task, seed=3, steps=8)
    drawn = [lessons[step] for step in range(8)]
    assert torch.equal(lessons[5].batch.ids, drawn[5].batch.ids)
    assert {kind for lesson in drawn for kind in lesson.batch.kinds} >= {"pair", "text", "count"}
    assert Lessons(pupil.prompts, task, seed=4, steps=8)[5].batch.ids.shape != drawn[5].batch.ids.shape
    with_pictures = [lesson for lesson in drawn if lesson.scenes]
    for lesson in with_pictures:
        visual = (lesson.batch.ids == pupil.model.config.image_token_id).sum()
        assert visual == lesson.grids.prod(1).sum() // 4 == len(lesson.pixels) // 4
