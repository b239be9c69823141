"""What a user of Transformers passes to ``generate()``, made by template, tokenizer and image processor alone."""

from __future__ import annotations

from typing import Any

from PIL import Image

from kvferry.models import VLM


def stock_inputs(vlm: VLM, picture: Image.Image, question: str) -> dict[str, Any]:
    """Inputs of a Qwen2-VL for one picture and a question."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    words = vlm.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pixels = dict(vlm.image_processor(images=[picture], return_tensors="pt"))
    tokens = int(pixels["image_grid_thw"].prod()) // vlm.image_processor.merge_size**2
    text = vlm.tokenizer(words.replace("<|image_pad|>", "<|image_pad|>" * tokens), return_tensors="pt")
    visual = (text["input_ids"] == vlm.model.config.image_token_id).long()
    return {**text, **pixels, "mm_token_type_ids": visual}
