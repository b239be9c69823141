"""Names, folders and fingerprints."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from kvferry.errors import ModelError, UnsupportedModelError
from kvferry.models import VLM, load
from kvferry.models.fingerprint import fingerprint_of
from tests.models.families import build
from tests.models.test_vlm import words_tokenizer


@pytest.mark.parametrize("device", ["nowhere", "meta", "cpu:1:2", object()])
def test_a_device_that_is_not_here(device: object) -> None:
    with pytest.raises(ModelError, match=r"no device .* use cpu"):
        load("testbed/edge", device=device)


def test_same_files_same_fingerprint(folder: Path, vlm: VLM, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert load(copy).fingerprint == vlm.fingerprint
    weights = load_file(copy / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert load(copy).fingerprint != vlm.fingerprint


def test_a_model_in_memory_has_a_fingerprint() -> None:
    first, second = build("llama")[0], build("llama")[0]
    assert fingerprint_of(first) == fingerprint_of(second) != fingerprint_of(build("mistral")[0])
    third = build("llama")[0]
    with torch.no_grad():
        third.lm_head.weight[0, 0] += 1
    assert fingerprint_of(third) != fingerprint_of(first)


def test_dtype_is_the_callers(folder: Path) -> None:
    assert load(folder).model.dtype == torch.bfloat16
    assert load(folder, dtype=torch.float32).model.dtype == torch.float32
    with pytest.raises(ModelError, match="bfloat16 or float16"):
        load(folder, dtype="float7")


def test_missing_weights_are_not_made_up(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, such as lm_head.weight"):
        load(copy)


def test_what_is_no_model(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folder / "config.json", bare)
    for name, message in (
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "nowhere", "there is no model at"),
        ("testbed/nowhere", "there is no model at"),
        ("not a name!", "there is no model at"),
        (broken, "cannot be loaded"),
        (bare, "cannot be loaded"),
    ):
        with pytest.raises(ModelError, match=message):
            load(name)


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="check the name"):
        load("kvferry-tests/no-such-model")


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])
def test_other_families_load_from_a_folder(name: str, tmp_path: Path) -> None:
    """A text model, tied embeddings, and a vision model without a processor, which still reads text."""
    model, _ = build(name)
    model.save_pretrained(tmp_path)
    words_tokenizer().save_pretrained(tmp_path)
    vlm = load(tmp_path)
    cache = vlm.prefill(question="what colour is the circle ?").cache
    assert len(vlm.resume(cache, max_new_tokens=3).token_ids) <= 3
    if vlm.has_vision:
        with pytest.raises(UnsupportedModelError, match="processor could not be loaded"):
            vlm.prefill([np.zeros((16, 16, 3), np.uint8)], "what ?")


def test_an_unserved_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    """Only the configuration is there: a look at the weights would be another error."""
    tf.MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, state_size=4).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="mamba models cannot be served: recurrent"):
        load(tmp_path)
