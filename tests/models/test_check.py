"""A family is supported where four ways to the same answer agree on a small model of it; else it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from transformers import CONFIG_MAPPING

import kvferry
from kvferry.errors import UnsupportedModelError
from kvferry.evidence import EvidenceRequest
from kvferry.models import compressing, prefill_inputs
from kvferry.models.check import TOLERANCE, WHAT, Verdict, memory, trial, verdict_of, verdict_on
from kvferry.models.check.families import check_apart, check_default, families
from kvferry.models.check.table import BEGIN, END
from kvferry.models.check.tiny import tiny_config, walk
from tests.models.families import TEXT, build

MODELS_PAGE = Path(__file__).parents[2] / "docs" / "models.md"
PROMPT = torch.arange(5, 45)[None]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is known on this machine or in this process."""
    monkeypatch.setenv("KVFERRY_HOME", str(tmp_path))
    monkeypatch.setattr(memory, "_by_key", {})
    return tmp_path


def diffllama() -> Any:
    return tf.DiffLlamaForCausalLM(tf.DiffLlamaConfig(**TEXT)).eval()


def jetmoe() -> Any:
    small = {k: v for k, v in TEXT.items() if k not in ("num_attention_heads", "num_key_value_heads")}
    config = tf.JetMoeConfig(**small, num_key_value_heads=2, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
    return tf.JetMoeForCausalLM(config).eval()


@pytest.mark.parametrize("make", [diffllama, jetmoe])
def test_models_that_mix_heads_keep_the_same_tokens_in_all_heads(make: Any) -> None:
    """Evicting other tokens in each head would be wrong by several standard deviations of a logit."""
    model = make()
    verdict = verdict_of(model)
    assert verdict.supported
    assert verdict.tied_heads
    assert verdict.differences["heads"].size > 1
    assert verdict.differences["evict"].size < TOLERANCE
    with pytest.raises(UnsupportedModelError, match="budget=shared"), compressing(model, "knorm@0.5"):
        model.generate(PROMPT, max_new_tokens=2)
    with compressing(model, "knorm@0.5,budget=shared") as report:
        model.generate(PROMPT, max_new_tokens=2)
    assert set(report.kept) == {20}
    prefilled = prefill_inputs(model, {"input_ids": PROMPT}, [EvidenceRequest("question", layers="last")])
    with pytest.raises(UnsupportedModelError, match="budget=shared"):
        kvferry.compress(prefilled, "knorm@0.5")
    blob = kvferry.compress(prefilled, "q2c@0.5,budget=shared")
    assert kvferry.models.continue_from(model, kvferry.decompress(blob), max_new_tokens=2).token_ids


def test_a_cache_of_another_machine_is_refused_too() -> None:
    """What crossed does not say that heads are tied; the model that resumes it knows."""
    model = diffllama()
    full = replace(prefill_inputs(model, {"input_ids": PROMPT}).cache, tied_heads=False)
    cache = kvferry.decompress(kvferry.compress(full, "knorm@0.5"))
    with pytest.raises(UnsupportedModelError, match="budget=shared"):
        kvferry.models.continue_from(model, cache)


def doge() -> Any:
    """Masks tokens by its own rule from a certain length on."""
    return tf.DogeForCausalLM(tf.DogeConfig(**TEXT, keep_window_size=2048))


def moshi() -> Any:
    return tf.MoshiForCausalLM(tf.MoshiConfig(**TEXT, head_dim=8, ffn_dim=48, sliding_window=3000))


def bert() -> Any:
    return tf.BertLMHeadModel(tf.BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                            intermediate_size=48))  # fmt: skip


@pytest.mark.parametrize(
    ("make", "reason"),
    [(doge, "own forward pass by"), (moshi, "own forward pass by"), (bert, "both directions: .* own forward pass by")],
)
def test_what_would_be_silently_wrong_is_refused_with_what_differed(make: Any, reason: str) -> None:
    model = make()
    with pytest.raises(UnsupportedModelError, match=f"{model.config.model_type} models cannot be served: .*{reason}"):
        prefill_inputs(model, {"input_ids": PROMPT})


@pytest.mark.parametrize("make", [tf.AutoModel.from_config, lambda c: tf.AutoModelForCausalLM.from_config(c).model])
def test_a_model_without_its_language_head_is_refused(make: Any) -> None:
    model = make(tf.LlamaConfig(**TEXT))
    with pytest.raises(UnsupportedModelError, match="pass the whole model"), compressing(model, "knorm@0.5"):
        pass
    with pytest.raises(UnsupportedModelError, match="LlamaModel does not generate text; pass the whole model"):
        prefill_inputs(model, {"input_ids": PROMPT})


UNSEEN = {
    "blenderbot": "the decoder alone, without the encoder's states, is an ordinary language model",
    "gemma4_unified_text": "text alone attends forwards; pictures, of which no small ones are made, see each other",
}
"""Refused by name although the check finds nothing: why it cannot."""


@pytest.mark.parametrize("name", ["mllama", "paligemma", "deepseek_v3", "bart", "mamba", *UNSEEN])
def test_what_is_refused_by_name_fails_the_check_too(name: str) -> None:
    verdict = next(check_default(*pair) for pair in families() if pair[0] == name)
    assert verdict.refused
    assert bool(verdict.failure) == (name not in UNSEEN)


@pytest.mark.parametrize("name", ["idefics", "kosmos-2", "blip-2", "phi4_multimodal", "gemma4", "vaultgemma"])
def test_no_family_crashes_late(name: str) -> None:
    """Either a check says that it is right, or there is a sentence that says why not."""
    verdict = next(check_default(*pair) for pair in families() if pair[0] == name)
    assert verdict.supported or verdict.refused or verdict.unchecked
    assert verdict.supported == (name in ("phi4_multimodal", "gemma4", "vaultgemma"))


def test_layers_of_different_heads_cross(home: Path) -> None:
    """Gemma 4's full layers have wider heads than its sliding ones."""
    config = tf.Gemma4TextConfig(**TEXT, head_dim=8, global_head_dim=16, sliding_window=12, num_kv_shared_layers=0,
                                 hidden_size_per_layer_input=0, vocab_size_per_layer_input=96,
                                 layer_types=["sliding_attention", "sliding_attention", "full_attention"])  # fmt: skip
    torch.manual_seed(0)
    model = tf.Gemma4ForCausalLM(config).eval()
    prefilled = prefill_inputs(model, {"input_ids": PROMPT}, [EvidenceRequest("question", layers="last")])
    assert [x.keys.shape[-1] for x in prefilled.cache] == [8, 8, 16]
    said = model.generate(PROMPT, max_new_tokens=4, do_sample=False, eos_token_id=-1)[0, 40:].tolist()
    full = kvferry.decompress(kvferry.compress(prefilled, "full"))
    assert list(kvferry.models.continue_from(model, full, max_new_tokens=4, stop=()).token_ids) == said
    half = kvferry.decompress(kvferry.compress(prefilled, "knorm@0.5,budget=head|int8|zstd"))
    assert len(kvferry.models.continue_from(model, half, max_new_tokens=4, stop=()).token_ids) == 4
    with pytest.raises(UnsupportedModelError, match="differ in heads"):
        kvferry.models.support.kv_shape(model)


def test_a_verdict_is_found_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process and on this machine; a damaged file is made anew."""
    tried: list[str] = []

    def counted(kind: Any, config: Any) -> Verdict:
        tried.append(kind.__name__)
        return trial.try_out(kind, config)

    monkeypatch.setattr(memory, "try_out", counted)
    config = tf.Qwen2Config(**TEXT)
    first = verdict_on(tf.Qwen2ForCausalLM, config)
    larger = tf.Qwen2Config(**{**TEXT, "vocab_size": 5000, "num_hidden_layers": 9})
    assert first.supported
    assert verdict_on(tf.Qwen2ForCausalLM, config) is first
    (stored,) = (home / "checks").iterdir()
    monkeypatch.setattr(memory, "_by_key", {})
    assert verdict_on(tf.Qwen2ForCausalLM, config) == first
    assert len(tried) == 1
    for damage in ("[]", json.dumps({**json.loads(stored.read_text()), "differences": {"full": None}})):
        stored.write_text(damage)
        monkeypatch.setattr(memory, "_by_key", {})
        assert replace(verdict_on(tf.Qwen2ForCausalLM, config), seconds=0) == replace(first, seconds=0)
        assert json.loads(stored.read_text())["supported"]
    assert len(tried) == 3
    verdict_on(tf.Qwen2ForCausalLM, larger)
    assert len(tried) == 4
    assert sorted(home.rglob("*.part")) == []


def test_a_check_leaves_nothing_behind(home: Path) -> None:
    model, _ = build("llama")
    torch.manual_seed(5)
    rng, implementation = torch.random.get_rng_state(), model.config._attn_implementation
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            verdict = verdict_of(model)
            assert torch.is_inference_mode_enabled()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert verdict.supported
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert torch.is_grad_enabled()
    assert model.config._attn_implementation == implementation
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    again = verdict_on(type(model), model.config, anew=True)
    assert again.differences == verdict.differences
    assert again.moved == verdict.moved


def test_a_folder_that_cannot_be_written_costs_time_only(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "file").write_text("")
    monkeypatch.setenv("KVFERRY_HOME", str(home / "file"))
    assert verdict_on(tf.Qwen2ForCausalLM, tf.Qwen2Config(**TEXT)).supported


def test_a_small_configuration_keeps_what_attention_depends_on() -> None:
    large = CONFIG_MAPPING["gemma3"]()
    small = tiny_config(large)
    assert set(small.text_config.layer_types) == {"sliding_attention", "full_attention"}
    assert small.text_config.sliding_window == 12
    assert small.text_config.num_hidden_layers == len(small.text_config.layer_types) == 3
    assert small.image_token_index < small.text_config.vocab_size
    assert large.text_config.num_hidden_layers == 26
    assert max(x for part in walk(small) for x in vars(part).values() if type(x) is int) <= 512
    m_rope = tiny_config(CONFIG_MAPPING["qwen2_5_vl"]()).text_config.rope_parameters["mrope_section"]
    assert sum(m_rope) == 16
    assert len(m_rope) == 3


ROWS = ["diffllama", "smolvlm", "doge", "mllama", "kosmos-2"]


@pytest.mark.parametrize("name", ROWS)
def test_rows_of_the_page_are_what_a_check_says(name: str) -> None:
    text = MODELS_PAGE.read_text(encoding="utf-8")
    lines = [x for x in text.split(BEGIN)[1].split(END)[0].splitlines() if x.startswith(f"| {name} |")]
    found = {x.model: x for x in (check_default(*pair) for pair in families() if pair[0] == name)}
    assert len(lines) == len(found)
    for line in lines:
        _, _, model, *cells, _ = [x.strip() for x in line.split("|")]
        verdict = found[model]
        assert verdict.supported == (len(cells) == len(WHAT))
        if verdict.supported:
            assert verdict.tied_heads == ("budget=shared" in line)
            assert all(float(x) < TOLERANCE for x in cells if "shared" not in x)
        else:
            assert cells[0].split(" by ")[0] in verdict.reason


def test_the_page_knows_every_family() -> None:
    text = MODELS_PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    if f"Transformers {tf.__version__}" in text:
        assert all(f"| {family} | {name} |" in text for family, name in families())


def test_a_family_that_takes_too_long_is_said_so() -> None:
    verdict = check_apart("llama", "LlamaForCausalLM", seconds=0.01)
    assert verdict.unchecked == "no result within 0.01 seconds"
    assert not verdict.supported
