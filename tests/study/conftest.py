"""A small random language model of the testbed's words."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import kvferry
from kvferry import VLM
from kvferry.testbed.build import build_tokenizer
from tests.models.families import TEXT


@pytest.fixture(scope="session")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    path, tokenizer = tmp_path_factory.mktemp("model") / "words", build_tokenizer()
    torch.manual_seed(1)
    settings = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**settings))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=2 * weight.shape[1] ** -0.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return kvferry.load(path, dtype="float32")
