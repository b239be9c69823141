"""A Qwen2-VL whose language model is SmolLM2, number for number, and whose tower is the control model's.

Qwen2-VL's text model is Llama with biases (which stay zero) and M-RoPE, which turns text as RoPE does: without pictures
the grown model computes what SmolLM2 computes. Four tokens that SmolLM2 had for code repositories become those around
and in place of pictures, so that the vocabulary is the same.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from kvferry.models.grown import rename_tokens, without_layers, write_grown
from kvferry.models.load import find_folder
from kvferry.testbed.build import MERGE, PATCH
from kvferry.testbed.words import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START

from .lowrank import LowRankUpdate

LANGUAGE, TOWER = "smollm2", "testbed/control"
RENAMED = {3: VISION_START, 5: VISION_END, 6: IMAGE_PAD, 7: VIDEO_PAD}
"""Token id -> its new name; they were ``<repo_name>``, ``<file_sep>``, ``<filename>`` and ``<gh_stars>``."""
MIN_SIDE, MAX_SIDE = 128, 256
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' and (message['content'] is string or "
    "message['content'] | selectattr('type', 'equalto', 'image') | list | length == 0) %}"
    "{{ '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""SmolLM2's own; a prompt that begins with a picture has no system message."""


def sections(head_dim: int) -> list[int]:
    """M-RoPE's share of a head's frequencies for time, rows and columns.

    Rows and columns are told apart by one or two dozen steps, so they get the quick ones.
    """
    half = head_dim // 2
    rows = max(1, half // 8)
    return [1, rows, half - 1 - rows]


def build_config(language: Any, tower: Any, layers: int | None = None) -> Qwen2VLConfig:
    """From the configuration of a Llama (its first layers) and of a vision-language model whose tower to take."""
    vision = {**tower.vision_config.to_dict(), "hidden_size": language.hidden_size}
    rope = {**language.rope_parameters, "mrope_section": sections(language.head_dim)}
    shared = (
        "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id",
        "pad_token_id", "tie_word_embeddings",
    )  # fmt: skip
    ids = {name: token for token, name in RENAMED.items()}
    config = Qwen2VLConfig(
        text_config={
            **{name: getattr(language, name) for name in shared},
            "rope_parameters": rope,
            "num_hidden_layers": min(layers or language.num_hidden_layers, language.num_hidden_layers),
        },
        vision_config=vision,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=language.tie_word_embeddings,
    )
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    return config


@torch.no_grad()
def grow(
    language: str | Path = LANGUAGE, tower: str | Path = TOWER, layers: int | None = None
) -> Qwen2VLForConditionalGeneration:
    """The untrained model in float32: SmolLM2 and the control model's tower, with nothing learned between them.

    Parameters
    ----------
    layers : int, optional
        Only the first of SmolLM2's layers, for an edge; they no longer write by themselves.
    """
    words = AutoModelForCausalLM.from_pretrained(find_folder(str(language)), dtype=torch.float32)
    seeing = Qwen2VLForConditionalGeneration.from_pretrained(find_folder(str(tower)), dtype=torch.float32)
    model = Qwen2VLForConditionalGeneration(build_config(words.config, seeing.config, layers)).float()
    state = without_layers(words.model.state_dict(), model.config.text_config.num_hidden_layers)
    left = model.model.language_model.load_state_dict(state, strict=False)
    if left.unexpected_keys or not all(name.endswith("_proj.bias") for name in left.missing_keys):
        raise ValueError(f"{language} is not a Llama: {[*left.unexpected_keys, *left.missing_keys][:3]} do not fit")
    for name, weight in model.model.language_model.named_parameters():
        if name.endswith("_proj.bias"):
            weight.zero_()
    if not words.config.tie_word_embeddings:
        model.lm_head.load_state_dict(words.lm_head.state_dict())
    kept = {name: x for name, x in seeing.model.visual.state_dict().items() if not name.startswith("merger.mlp.2")}
    model.model.visual.load_state_dict(kept, strict=False)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=64, bos_token_id=words.config.bos_token_id,
        eos_token_id=words.config.eos_token_id, pad_token_id=words.config.pad_token_id,
    )  # fmt: skip
    return model.eval()


def build_tokenizer(language: str | Path = LANGUAGE) -> PreTrainedTokenizerFast:
    """SmolLM2's own with the renamed tokens and a template that knows pictures."""
    old = AutoTokenizer.from_pretrained(find_folder(str(language)))
    parts = rename_tokens(json.loads(old.backend_tokenizer.to_str()), RENAMED)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(parts)),
        bos_token=old.bos_token,
        eos_token=old.eos_token,
        pad_token=old.pad_token or old.eos_token,
        unk_token=old.unk_token,
        extra_special_tokens={
            "image_token": IMAGE_PAD,
            "video_token": VIDEO_PAD,
            "vision_start_token": VISION_START,
            "vision_end_token": VISION_END,
        },
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_folder(
    model: Qwen2VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, update: LowRankUpdate, language: str,
    folder: Path,
) -> None:  # fmt: skip
    """Save what was learned and everything small; `kvferry.load` joins it with the language model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(model.config)
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()  # the language model has it
    Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_SIDE**2, "longest_edge": MAX_SIDE**2},
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
    ).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"processor_class": "PaddleOCRVLProcessor"}\n')
    tower = {f"model.visual.{name}": weight for name, weight in model.model.visual.state_dict().items()}
    learned = {f"model.language_model.{name}": weight for name, weight in update.learned().items()}
    write_grown(folder, language, tower | learned, RENAMED)
