"""Visual tokens dropped inside prefill: what each layer holds is exactly what a masked pass gives it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import kvferry
from kvferry.errors import EvidenceError, InputError, UnsupportedModelError
from kvferry.evidence import Prefilled
from kvferry.models import VLM, Pruning, prefill_flops, prefill_inputs
from kvferry.models.attention import attached
from kvferry.models.layout import layout_of
from kvferry.models.prefill import read_prompt
from kvferry.models.pruning import _read, check_prunable, decoder_layers, pruned_against_masked
from tests.models.families import build

TOLERANCE = 1e-4


def read(model: Any, inputs: Any, prune: Pruning | None = None, **options: Any) -> Prefilled:
    """Without a look at whether the family is prunable: the small vocabulary here cannot be tried out."""
    layout = layout_of(model, inputs, options.pop("question_mask", None))
    where: dict[str, Any] = {"length": len(layout) - 1, "fingerprint": ""}
    with attached(model):
        if prune is None:
            return read_prompt(model, inputs, layout, options.pop("requests", ()), **where, **options)
        return _read(model, inputs, layout, prune, **where)


PRUNABLE = ("qwen2_vl", "qwen2_5_vl", "llava", "llava_onevision", "smolvlm", "internvl", "gemma3", "qwen3_vl")


@pytest.mark.parametrize("looks", ["question", "last"])
@pytest.mark.parametrize("family", PRUNABLE)
def test_dropping_is_masking(family: str, looks: str) -> None:
    model, inputs = build(family)
    for layer in (1, 2):
        difference, moved = pruned_against_masked(model, inputs, Pruning(layer, 0.3, looks))
        assert difference < TOLERANCE
        assert moved > 100 * TOLERANCE


@pytest.mark.parametrize("family", ["qwen2_vl", "llava"])
def test_every_layer_holds_what_it_computed(family: str) -> None:
    model, inputs = build(family)
    found = read(model, inputs, Pruning(2, 0.4))
    layout, length = found.cache.layout, found.cache.length
    visual, n = int(layout.visual.sum()), len(layout)
    kept = n - visual + round(0.4 * visual)
    assert found.cache.kept == (n - 1, n - 1, kept - 1)
    deep = set(found.cache.layers[2].positions[0].tolist())
    assert {i for i in range(length) if not layout.visual[i]} <= deep
    whole, few = prefill_flops(model, n), prefill_flops(model, n, found.cache)
    a_layer = whole // 3
    assert whole - few == pytest.approx(a_layer - prefill_flops(model, kept) // 3, abs=3)


def test_what_stays_is_what_the_question_looked_at() -> None:
    model, inputs = build("qwen2_vl")
    found = read(model, inputs, Pruning(1, 0.4))
    layout = found.cache.layout
    request = Pruning(1, 0.4).request
    seen = read(model, inputs, requests=[request]).evidence
    scores = seen.of(request, 0).mean(0)
    kept = torch.zeros(len(layout), dtype=torch.bool)
    kept[found.cache.layers[1].positions[0]] = True
    kept, visual = kept[:-1], torch.from_numpy(layout.visual[:-1])
    assert scores[visual & kept].min() >= scores[visual & ~kept].max()
    assert found.next_logits.isfinite().all()


def test_all_of_them_is_a_plain_prefill() -> None:
    model, inputs = build("qwen2_vl")
    plain, found = read(model, inputs), read(model, inputs, Pruning(1, 1.0))
    torch.testing.assert_close(found.next_logits, plain.next_logits)
    for ours, theirs in zip(found.cache, plain.cache, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys)


def test_it_ships_and_answers(vlm: VLM, picture: Image.Image) -> None:
    """Through the bitstream as it is; the first answer token is that of the pruned pass itself."""
    prune = kvferry.Pruning(1, 0.5)
    found = vlm.prefill([picture], "what is this?", prune=prune)
    restored = kvferry.decompress(kvferry.compress(found, "full|bf16"))
    assert [x.positions.tolist() for x in restored] == [x.positions.tolist() for x in found.cache]
    first = vlm.resume(found.cache, max_new_tokens=1).token_ids
    assert first in ((int(found.next_logits.argmax()),), ())
    assert vlm.answer(restored) == vlm.answer(found.cache)
    small = kvferry.compress(found, "full|int4")
    assert len(small) < len(kvferry.compress(vlm.prefill([picture], "what is this?"), "full|int4"))
    with pytest.raises(InputError, match="already pruned"):
        kvferry.compress(found, "knorm@0.5|int4")


def test_without_a_picture_there_is_nothing_to_drop(vlm: VLM) -> None:
    plain, found = (vlm.prefill([], "what is this?", prune=x) for x in (None, Pruning(1, 0.5)))
    assert found.cache.kept == plain.cache.kept


def test_refusals(vlm: VLM, picture: Image.Image) -> None:
    for bad in ((0, 0.5), (1, 0.0), (1, 1.5)):
        with pytest.raises(InputError, match="the layer is at least 1"):
            Pruning(*bad)
    with pytest.raises(InputError, match="'question' or by the 'last'"):
        Pruning(1, 0.5, "first")
    prune = Pruning(1, 0.5)
    for options in ({"recipe": "snapkv@0.5"}, {"requests": [prune.request]}):
        with pytest.raises(InputError, match=r"cannot be observed or ranked again.*full\|CODEC"):
            vlm.prefill([picture], "what?", prune=prune, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pass the question"):
        vlm.prefill([picture], prune=prune)
    with pytest.raises(UnsupportedModelError, match=rf"from layer 1 to {vlm.layers - 1} on.*layer=99"):
        vlm.prefill([picture], "what?", prune=Pruning(99, 0.5))
    model, inputs = build("llava")
    none = torch.zeros(inputs["input_ids"].shape[1], dtype=torch.bool)
    with pytest.raises(EvidenceError, match="no 'question' rows"):
        read(model, inputs, prune, question_mask=none)
    with pytest.raises(UnsupportedModelError, match=r"llava cannot be dropped inside prefill: .*no picture"):
        prefill_inputs(model, inputs, prune=prune)


def test_pictures_that_are_added_to_layers_too() -> None:
    model, _ = build("qwen3_vl")
    model.config.vision_config.deepstack_visual_indexes = [0, 1]
    with pytest.raises(UnsupportedModelError, match="from layer 2 to 2 on, since pictures are added to its first"):
        check_prunable(model, Pruning(1, 0.5))


def test_another_family_is_found_out() -> None:
    """A layer that is given something unknown for every token is refused by that name."""
    model, inputs = build("qwen2_vl")
    extra = torch.zeros(inputs["input_ids"].shape[1], 4)

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "extra": extra}

    handle = decoder_layers(model)[1].register_forward_pre_hook(before, with_kwargs=True)
    try:
        with pytest.raises(UnsupportedModelError, match="extra"):
            pruned_against_masked(model, inputs, Pruning(1, 0.5))
    finally:
        handle.remove()
    assert layout_of(model, inputs).visual.any()
