"""What is grown on SmolLM2 reads text as SmolLM2 does, until it has learned otherwise: `make test-smol`."""

from __future__ import annotations

import pytest
import torch

import kvferry
from kvferry.testbed.smol.build import build_tokenizer, grow
from kvferry.testbed.smol.data import sample
from kvferry.testbed.smol.english import KINDS
from kvferry.testbed.smol.photographs import SOURCES, photographs
from kvferry.testbed.smol.vectors import label_vectors
from kvferry.testbed.targets import GROUPS, OFFSETS

pytestmark = pytest.mark.smol


def test_text_is_unchanged_and_words_have_vectors() -> None:
    smollm2, grown, tokenizer = kvferry.load("smollm2", dtype="float32"), grow(), build_tokenizer()
    ids = smollm2.prefill(question="Name three colours.").cache.layout.token_ids.tolist()
    asked = [{"role": "user", "content": "Name three colours."}]
    assert tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"] == ids
    with torch.no_grad():
        ours, theirs = (model(input_ids=torch.tensor([ids])).logits[0] for model in (grown, smollm2.model))
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)
    vectors = label_vectors(tokenizer, grown.get_input_embeddings().weight)
    first = OFFSETS[list(GROUPS).index("first")]
    four = grown.get_input_embeddings().weight[tokenizer("4", add_special_tokens=False)["input_ids"]]
    torch.testing.assert_close(vectors[first + 4], four[0].detach())


def test_the_test_split_has_photographs_of_its_own() -> None:
    assert len(photographs("test")) == len(SOURCES["test"])
    drawn = [sample("test", index) for index in range(len(KINDS))]
    assert [one.kind for one in drawn] == list(KINDS)
    assert all(64 <= image.width * image.height // 256 <= 256 for one in drawn for image in one.images)
