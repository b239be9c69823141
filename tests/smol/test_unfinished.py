"""The unfinished vision-language model on SmolLM2: it sees, it reads as before, and its caches cross as others do."""

from __future__ import annotations

import pytest
import torch

import kvferry
from kvferry import VLM
from kvferry.testbed.data import Sample, exact_match
from kvferry.testbed.smol.data import samples

pytestmark = pytest.mark.smol
KINDS = ("colour", "shape", "glyph", "relation")
PARAGRAPH = (
    "The ferry crosses the river every hour from six in the morning until late at night. In winter, when ice covers "
    "the water, a small icebreaker goes before it, and the crossing takes twice as long."
)


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return kvferry.load("testbed/smol", dtype="float32")


@pytest.fixture(scope="module")
def asked() -> list[Sample]:
    return list(samples("validation", 24, kinds=KINDS))


def test_it_sees(vlm: VLM, asked: list[Sample]) -> None:
    seen = blind = 0
    for one in asked:
        prefilled = vlm.prefill(one.images, one.question)
        seen += exact_match(vlm.answer(prefilled), one.answer)
        nothing = kvferry.decompress(kvferry.compress(prefilled, "none|bf16"))
        blind += exact_match(vlm.answer(nothing), one.answer)
    assert seen >= 10
    assert seen >= 2 * blind


def test_it_reads_as_before(vlm: VLM) -> None:
    smollm2 = kvferry.load("smollm2", dtype="float32")
    ids = torch.tensor([vlm.tokenizer(PARAGRAPH)["input_ids"]])
    with torch.no_grad():
        now, before = (model(input_ids=ids).logits.log_softmax(-1) for model in (vlm.model, smollm2.model))
    moved = torch.nn.functional.kl_div(now, before, log_target=True, reduction="none").sum(-1).mean()
    assert 0 < moved < 0.3


def test_its_caches_cross(vlm: VLM, asked: list[Sample]) -> None:
    same = {"full|bf16": 0, "leaveout@0.5|int8|zstd": 0}
    for one in asked[:8]:
        prefilled = vlm.prefill(one.images, one.question, recipe="leaveout@0.5")
        said = vlm.answer(prefilled)
        for recipe in same:
            again = kvferry.decompress(kvferry.compress(prefilled, recipe))
            assert again.fingerprint == vlm.fingerprint
            same[recipe] += vlm.answer(again) == said
    assert same["full|bf16"] >= 7
    assert same["leaveout@0.5|int8|zstd"] >= 6
