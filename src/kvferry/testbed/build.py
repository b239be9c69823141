"""Write a complete model folder: configuration, weights, tokenizer, image processor, chat template.

What was found about processors (Transformers 5.23, no torchvision): `Qwen2VLProcessor` insists on a video processor,
and Qwen2-VL's imports torchvision. `PaddleOCRVLProcessor` is the image half of the same code (repeat the placeholder
once per visual token, mark the modality), needs neither, and takes any tokenizer with an `image_token`; naming it in
`processor_config.json` lets `AutoProcessor` load the folder. `AutoTokenizer` and `AutoImageProcessor` work as ever.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
)

from kvferry.pictures.familiar import FILE as TRAINING_PICTURES

from . import words
from .words import TOKEN_ID

PATCH = 8
MERGE = 2
CELL = PATCH * MERGE
"""Pixels per visual token, along each side."""
MIN_SIDE, MAX_SIDE = 192, 256
SHOWS = "drawn scenes of coloured shapes with digits, letters and words"
"""What its models' training shows, for whoever gives them something else."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Size:
    """The dimensions of one testbed model; every attention head has 32 channels."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    tower_depth: int = 4
    tower_width: int = 128
    tower_heads: int = 4


SIZES: dict[str, Size] = {
    "edge": Size(layers=4, hidden=128, heads=4, kv_heads=2, intermediate=352),
    "cloud": Size(layers=6, hidden=192, heads=6, kv_heads=2, intermediate=512),
    "control": Size(layers=4, hidden=128, heads=4, kv_heads=2, intermediate=352),
}


def build_config(size: Size) -> Qwen2VLConfig:
    """The genuine Qwen2-VL configuration, only small."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(words.VOCABULARY),
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
            "bos_token_id": TOKEN_ID[words.END_OF_TEXT],
            "eos_token_id": TOKEN_ID[words.IM_END],
            "pad_token_id": TOKEN_ID[words.END_OF_TEXT],
        },
        vision_config={
            "depth": size.tower_depth,
            "embed_dim": size.tower_width,
            "num_heads": size.tower_heads,
            "hidden_size": size.hidden,
            "mlp_ratio": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
        },
        image_token_id=TOKEN_ID[words.IMAGE_PAD],
        video_token_id=TOKEN_ID[words.VIDEO_PAD],
        vision_start_token_id=TOKEN_ID[words.VISION_START],
        vision_end_token_id=TOKEN_ID[words.VISION_END],
        tie_word_embeddings=False,
    )
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    return config


def build_model(size: Size, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """An untrained model; small output projections and wide word vectors make it learn sooner."""
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(build_config(size))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model" in name and weight.ndim == 2:
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(0.05)
            if name.endswith("embed_tokens.weight"):
                torch.nn.init.normal_(weight, std=0.5)
            if name.endswith("lm_head.weight"):
                torch.nn.init.normal_(weight, std=0.02)
            if "visual" in name and weight.ndim >= 2:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    model.generation_config = build_generation_config()
    return model


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; digits always stand alone, so that "47" is two tokens."""
    tokenizer = Tokenizer(models.WordLevel(vocab=dict(TOKEN_ID), unk_token=words.UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[0-9]|[.,?:!]"), behavior="isolated"),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=words.UNKNOWN,
        pad_token=words.END_OF_TEXT,
        eos_token=words.IM_END,
        extra_special_tokens={
            "image_token": words.IMAGE_PAD,
            "video_token": words.VIDEO_PAD,
            "vision_start_token": words.VISION_START,
            "vision_end_token": words.VISION_END,
            "turn_start_token": words.IM_START,
        },
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """The PIL image processor; pictures from 192x192 to 256x256 px keep their size."""
    return Qwen2VLImageProcessorPil(
        size={"shortest_edge": MIN_SIDE**2, "longest_edge": MAX_SIDE**2},
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
    )


def build_generation_config() -> GenerationConfig:
    """Greedy decoding that stops at the end of the assistant's turn."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        eos_token_id=TOKEN_ID[words.IM_END],
        pad_token_id=TOKEN_ID[words.END_OF_TEXT],
        bos_token_id=TOKEN_ID[words.END_OF_TEXT],
    )


def write_folder(model: Qwen2VLForConditionalGeneration, folder: Path) -> None:
    """Save everything that the Auto classes need, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    build_image_processor().save_pretrained(folder)
    build_generation_config().save_pretrained(folder)
    (folder / "processor_config.json").write_text('{"processor_class": "PaddleOCRVLProcessor"}\n')
    seen = {"shows": SHOWS, "sides": list(range(MIN_SIDE, MAX_SIDE + 1, CELL))}
    (folder / TRAINING_PICTURES).write_text(json.dumps(seen) + "\n")


def main() -> None:
    """Write one untrained model folder."""
    import argparse

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", choices=sorted(SIZES), default="cloud")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    write_folder(build_model(SIZES[arguments.model], arguments.seed), arguments.out)


if __name__ == "__main__":
    main()
