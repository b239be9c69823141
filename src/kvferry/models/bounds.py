"""What a cache, and the words and pictures of a prompt, can be for one model: plain numbers, checked beforehand."""

from __future__ import annotations

from transformers import PreTrainedModel

from kvferry.bounds import ModelBounds
from kvferry.models.embeds import MAX_VISUAL_TOKENS
from kvferry.models.support import kv_shapes, text_config, visual_token_ids


def bounds_of(model: PreTrainedModel, fingerprint: str) -> ModelBounds:
    """What a stream may announce that is to be resumed on ``model``."""
    return ModelBounds(
        fingerprint=fingerprint,
        shapes=tuple(kv_shapes(model)),
        vocabulary=int(model.get_input_embeddings().num_embeddings),
        longest=int(getattr(text_config(model), "max_position_embeddings", None) or 0),
        axes=3 if hasattr(getattr(model, "model", model), "get_rope_index") else 1,
        visual_ids=tuple(visual_token_ids(model.config)),
        visual_tokens=MAX_VISUAL_TOKENS,
    )
