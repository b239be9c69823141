"""The vision tower apart from the language model, and the digests that say whether two ends share either."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import kvferry
from kvferry import InputError, UnsupportedModelError
from kvferry.models import prefill_inputs
from kvferry.models.embeds import check_embeds, check_total, visual_tokens
from tests.crossing.process import write_model
from tests.models import families


class GridProcessor:
    """Stands for an image processor with a patch grid."""

    merge_size = 2


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_embeddings_in_place_of_pixels(family: str) -> None:
    torch.manual_seed(0)
    model, inputs = getattr(families, family)()
    model.eval()
    check_embeds(model, GridProcessor())
    with torch.inference_mode():
        seen = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    split = {name: value for name, value in inputs.items() if name != "pixel_values"}
    split["visual_embeds"] = torch.cat(list(seen.pooler_output))
    whole, apart = prefill_inputs(model, inputs), prefill_inputs(model, split)
    assert torch.equal(whole.next_logits, apart.next_logits)
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(whole.cache, apart.cache, strict=True))
    np.testing.assert_array_equal(whole.cache.layout.positions, apart.cache.layout.positions)


def test_more_than_one_embedding_per_token_is_refused() -> None:
    model, _ = families.qwen3_vl()
    with pytest.raises(UnsupportedModelError, match="several layers"):
        check_embeds(model, GridProcessor())
    model, _ = families.llava()
    with pytest.raises(UnsupportedModelError, match="patch grid"):
        check_embeds(model, object())


def test_fingerprints(tmp_path: Path) -> None:
    first, other = write_model(tmp_path / "first"), write_model(tmp_path / "other", seed=1)
    one, wide, two = kvferry.load(first), kvferry.load(first, dtype="float32"), kvferry.load(other)
    assert one.vision_fingerprint == wide.vision_fingerprint != two.vision_fingerprint
    assert one.prompt_fingerprint == two.prompt_fingerprint
    one.tokenizer(["a", "longer words"], padding=True, truncation=True, max_length=2)
    again = kvferry.VLM(one.model, one.tokenizer, one.processor, one.image_processor)
    assert again.prompt_fingerprint == two.prompt_fingerprint
    settings = json.loads((other / "preprocessor_config.json").read_text())
    settings["image_mean"][0] += 0.1
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    assert kvferry.load(other).prompt_fingerprint != two.prompt_fingerprint


def test_sizes_are_bounded() -> None:
    assert visual_tokens((1, 28, 26), 2) == 182
    for grid in ((1, 27, 26), (0, 2, 2), (1, 2, 1 << 30), (1, 1 << 10, 1 << 10)):
        with pytest.raises(InputError, match=r"patches|tokens"):
            visual_tokens(grid, 2)
    check_total(16_384)
    with pytest.raises(InputError, match="20,000"):
        check_total(20_000)
