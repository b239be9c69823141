"""Visual tokens dropped and merged before the language model: every layer holds what a masked pass gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import kvferry
from kvferry.errors import InputError, UnsupportedModelError
from kvferry.models import VLM, TowerPruning, prefill_flops, prefill_inputs
from kvferry.models.attention import Session, session
from kvferry.models.tower_pruning import merged, ranked, zipped
from kvferry.selection.base import Selection
from kvferry.selection.eviction import kept_count
from tests.models.families import build


def test_what_is_dominant_and_what_is_merged_into_what() -> None:
    """By hand: 6 tokens, 4 stay, 2 of these contextual."""
    embeds = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    received = torch.tensor([0.1, 0.9, 0.1, 0.1, 0.8, 0.1])
    keys = torch.tensor([[1.0, 0.0], [9.0, 9.0], [0.1, 1.0], [0.0, 2.0], [9.0, 9.0], [5.0, 0.1]])
    kept, found = merged(embeds, received, keys, TowerPruning(4 / 6, 0.5))
    # dominant 1 and 4; of 0, 2, 3, 5 every second is a target: 0 and 3; 2 is most like 3, and 5 like 0
    assert kept.tolist() == [0, 1, 3, 4]
    assert found[:, 0].tolist() == [(1 + 6) / 2, 2, (4 + 3) / 2, 5]
    kept, found = merged(embeds, received, keys, TowerPruning(2 / 6, 0.0))
    assert (kept.tolist(), found[:, 0].tolist()) == ([1, 4], [2, 5])
    assert merged(embeds, received, keys, TowerPruning(0.01, 0.9))[0].tolist() == [1]
    kept, found = merged(embeds, received, keys, TowerPruning(1.0, 0.5))
    assert kept.tolist() == list(range(6))
    assert torch.equal(found, embeds)


def test_attention_received_is_that_of_the_block() -> None:
    """Against the tower's own eager attention; each frame's queries spread one unit over its patches."""
    model, inputs = build("qwen2_vl")
    tower: Any = model.model.visual
    tower.config._attn_implementation = "eager"
    seen: dict[str, Any] = {}
    attention = tower.blocks[-1].attn
    attention.register_forward_pre_hook(lambda m, a, k: seen.update(k, hidden_states=a[0] if a else k["hidden_states"]),
                                        with_kwargs=True)  # fmt: skip
    weights = []
    plain = torch.nn.functional.softmax

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        weights.append(plain(*args, **options))
        return weights[-1]

    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(torch.nn.functional, "softmax", watched)
        model.get_image_features(inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"])
    bounds = seen["cu_seqlens"]
    received, keys = ranked(attention, seen["hidden_states"], bounds, seen["position_embeddings"], 4)
    frames = len(bounds) - 1
    wanted = torch.cat([w[0].mean((0, 1)) for w in weights[-frames:]]).view(-1, 4).mean(1)
    torch.testing.assert_close(received, wanted)
    assert received.std() > 0
    assert len(keys) == len(received)


@pytest.mark.parametrize("contextual", [0.0, 0.5])
def test_dropping_is_masking(contextual: float) -> None:
    model, inputs = build("qwen2_vl")
    prune = TowerPruning(0.5, contextual)
    found = prefill_inputs(model, inputs, prune=prune)
    layout, length = found.cache.layout, found.cache.length
    with session(Session()):
        positions, embeds = zipped(model, inputs, layout, prune)
    visual, n = torch.from_numpy(layout.visual), len(layout)
    each = [int(grid.prod()) // 4 for grid in inputs["image_grid_thw"]]
    assert sum(each) == visual.sum()
    kept = n - sum(each) + sum(kept_count(0.5, tokens) for tokens in each)
    assert found.cache.kept == (kept - 1,) * len(found.cache.layers)
    few, alone = (prefill_flops(model, *x) for x in ((n, found.cache), (kept,)))
    assert few == alone < prefill_flops(model, n)
    held = tuple(layer.positions for layer in found.cache)
    selection = Selection(held, tuple(torch.zeros(x.shape) for x in held))
    read = torch.zeros(n, embeds.shape[1])
    read[positions] = embeds
    given = {k: v for k, v in inputs.items() if k != "pixel_values"} | {"visual_embeds": read[visual]}
    masked = prefill_inputs(model, given, construct=selection)
    torch.testing.assert_close(found.next_logits, masked.next_logits, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(found.cache, masked.cache, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        torch.testing.assert_close(ours.keys, theirs.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.values, theirs.values, rtol=1e-4, atol=1e-4)
    assert length == n - 1
    assert (found.next_logits - prefill_inputs(model, inputs).next_logits).abs().max() > 0.01


def test_keeping_all_is_a_plain_prefill() -> None:
    model, inputs = build("qwen2_vl")
    plain, found = prefill_inputs(model, inputs), prefill_inputs(model, inputs, prune=TowerPruning(1.0))
    torch.testing.assert_close(found.next_logits, plain.next_logits)
    for ours, theirs in zip(found.cache, plain.cache, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)
        assert torch.equal(ours.positions, theirs.positions)


def test_it_ships_and_answers_with_a_question_and_without(vlm: VLM, picture: Image.Image) -> None:
    prune = kvferry.TowerPruning(0.5)
    asked = vlm.prefill([picture], "what is this?", prune=prune)
    restored = kvferry.decompress(kvferry.compress(asked, "full|bf16"))
    assert [x.positions.tolist() for x in restored] == [x.positions.tolist() for x in asked.cache]
    assert vlm.answer(restored) == vlm.answer(asked.cache)
    scene = vlm.prefill([picture], prune=prune)
    assert scene.cache.layout.visual.sum() == asked.cache.layout.visual.sum()
    first = vlm.resume(scene, "what is this?", max_new_tokens=1).token_ids
    assert first == vlm.resume(asked, max_new_tokens=1).token_ids


def test_refusals(vlm: VLM, picture: Image.Image) -> None:
    for bad in ((0.0, 0.1), (1.5, 0.1), (0.5, 1.0), (0.5, -0.1)):
        with pytest.raises(InputError, match=r"the fraction is in \(0, 1\]"):
            TowerPruning(*bad)
    prune = TowerPruning(0.5)
    with pytest.raises(InputError, match="cannot be observed or ranked again"):
        vlm.prefill([picture], "what?", prune=prune, recipe="snapkv@0.5")
    with pytest.raises(InputError, match="pass the pictures"):
        vlm.prefill(vlm.look([picture]), "what?", prune=prune)
    for family in ("qwen2_5_vl", "qwen3_vl", "llava"):
        model, inputs = build(family)
        with pytest.raises(UnsupportedModelError, match=f"tower of {family} cannot rank its tokens: only that of"):
            prefill_inputs(model, inputs, prune=prune)
