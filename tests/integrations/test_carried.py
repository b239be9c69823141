"""What evaluation harnesses get: answers on top of what crossed, in one piece of code for both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvferry.errors import InputError
from kvferry.integrations.carried import Carried, settings_of
from kvferry.recipe import compress, decompress
from kvferry.testbed import sample

RECIPE = "vlcache@0.3,modality=text_preserving|int4"


@pytest.fixture(scope="module")
def drawn() -> tuple[list[object], str]:
    found = sample("validation", 0)
    return list(found.images), found.question


def test_answers_are_those_of_the_decoded_bitstream(drawn: tuple[list[object], str]) -> None:
    images, question = drawn
    carried = Carried("testbed/edge", RECIPE.replace(",", ";"))
    assert str(carried.recipe) == RECIPE
    cache, asked = carried.scene(images, question)
    blob = compress(carried.vlm.prefill(images, question, recipe=RECIPE), RECIPE)
    assert asked is None
    assert carried.say(cache, most=12) == carried.vlm.answer(decompress(blob), max_new_tokens=12)
    assert (carried.tally.prompts, carried.tally.bytes) == (1, len(blob))
    assert carried.tally.ratio > 5
    assert carried.info()["kvferry_recipe"] == RECIPE


def test_in_protocol_b_the_question_comes_later(drawn: tuple[list[object], str]) -> None:
    images, question = drawn
    carried = Carried("testbed/edge", RECIPE, "B")
    cache, asked = carried.scene(images, question)
    assert asked == question
    scene = carried.vlm.prefill(images, recipe=RECIPE, proxy_question=carried.proxy)
    blob = compress(scene, RECIPE)
    assert carried.tally.bytes == len(blob)
    assert carried.say(cache, asked, most=12) == carried.vlm.answer(decompress(blob), question, max_new_tokens=12)
    with pytest.raises(InputError, match="protocol is A"):
        Carried("testbed/edge", RECIPE, "C")  # type: ignore[arg-type]


def test_an_answer_ends_before_its_stop(drawn: tuple[list[object], str]) -> None:
    carried = Carried("testbed/edge")
    word = sample("validation", 4)  # several letters
    cache, _ = carried.scene(word.images, word.question)
    whole = carried.say(cache, most=12)
    assert len(whole.split()) > 2
    assert carried.say(cache, most=12, until=[whole.split()[2], "never"]) == whole[: whole.index(whole.split()[2])]
    assert len(carried.say(cache, most=2).split()) == 2


def test_likelihood_is_the_models_own_on_a_full_cache() -> None:
    carried = Carried("testbed/edge", dtype="float32")
    ids = carried.vlm.tokenizer("tom has red , ann has blue . what has ann ?")["input_ids"]
    context, wanted = ids[:8], ids[8:]
    nats, greedy = carried.likelihood(carried.text(context), wanted)
    with torch.inference_mode():
        logits = carried.vlm.model(input_ids=torch.tensor([ids])).logits[0, 7:-1].double()
    own = logits.log_softmax(-1).gather(-1, torch.tensor(wanted)[:, None]).sum().item()
    assert nats == pytest.approx(own, rel=1e-2)
    assert greedy == bool((logits.argmax(-1) == torch.tensor(wanted)).all())
    best = int(logits[0].argmax())
    assert carried.likelihood(carried.text(context), [best])[1]


def test_settings_of_generation() -> None:
    assert settings_of({}, 7) == (7, [])
    assert settings_of({"until": "\n", "max_new_tokens": 3, "do_sample": False, "temperature": 0}, 7) == (3, ["\n"])
    assert settings_of({"until": ["a", "b"], "max_gen_toks": 3, "max_new_tokens": 4}, 7) == (3, ["a", "b"])
    assert settings_of({"do_sample": True, "temperature": 0}, 7) == (7, [])
    for asked in ({"do_sample": True}, {"do_sample": True, "temperature": 0.7}, {"num_beams": 4}):
        with pytest.raises(InputError, match="decodes greedily"):
            settings_of(asked, 7)


def test_the_example_tasks_are_the_testbeds_questions() -> None:
    import json

    lines = Path("examples/lmms_eval/testbed.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        drawn = sample("validation", row["index"])
        assert (row["question"], row["answer"]) == (drawn.question, drawn.answer)
    for row in map(json.loads, Path("examples/lm_eval/lookup.jsonl").read_text().splitlines()):
        assert row["answer"] in row["choices"]
