"""A checkpoint as a user of Transformers would download it, but small and random: what README.md's first block asks."""

from __future__ import annotations

from pathlib import Path

import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.models.families import build

WORDS = "<pad> <s> </s> <unk> <image> USER ASSISTANT : what colour is the circle ? red blue green box"
TEMPLATE = (
    "{{ bos_token }}USER : {% for part in messages[0]['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %} ASSISTANT :"
)


def save_llava(folder: Path) -> None:
    """A whole LLaVA folder: weights, configuration, tokenizer, processor."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS.split())}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    pixels = tf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    processor = tf.LlavaProcessor(
        pixels, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE, image_token="<image>",
    )  # fmt: skip
    model = build("llava")[0]
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
