"""SmolLM2's own weights: `make test-smol`."""

from __future__ import annotations

import pytest
import torch

import kvferry
from kvferry.models import VLM

pytestmark = pytest.mark.smol


@pytest.fixture(scope="module")
def smollm2() -> VLM:
    return kvferry.load("smollm2")


def test_it_is_what_the_paper_says(smollm2: VLM) -> None:
    assert (smollm2.layers, smollm2.kv_heads, smollm2.head_dim, smollm2.has_vision) == (30, 3, 64, False)
    assert 134e6 < sum(weight.numel() for weight in smollm2.model.parameters()) < 135e6
    assert smollm2.model.dtype == torch.bfloat16
    assert kvferry.load("smollm2").fingerprint == smollm2.fingerprint


def test_it_knows_the_capital_of_france_from_a_cache(smollm2: VLM) -> None:
    question = "What is the capital of France?"
    prefilled = smollm2.prefill(question=question, recipe="full|bf16")
    told = smollm2.tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert prefilled.cache.layout.token_ids.tolist() == told["input_ids"]
    for recipe in ("full|bf16", "full|int8|zstd"):
        blob = kvferry.compress(prefilled, recipe)
        assert "Paris" in smollm2.answer(kvferry.decompress(blob), max_new_tokens=16)
