"""What a GPU does is what the CPU does: the same tests on each device that is here (``make bench-gpu``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvferry.evidence import EvidenceRequest
from kvferry.models import VLM, continue_from, load, prefill_inputs
from kvferry.models.attention import rows_of
from kvferry.models.support import text_config
from kvferry.recipe import compress, decompress
from kvferry.testbed import samples
from tests.models.families import FAMILIES, build
from tests.models.test_families import use

REQUESTS = (EvidenceRequest("question"), EvidenceRequest("window", window=5), EvidenceRequest("all"))
RECIPES = (
    "full|bf16", "snapkv@0.3,budget=head|int8", "vlcache@0.3,merge=lookm|int4|zstd", "leaveout@0.3|kivi:4",
    "q2c@0.5|fp8", "h2o@0.3,modality=adaptive|int3,coder=range", "expected_attention@0.3|turbo:3",
    "keydiff@0.3|svd:8", "leaveout@0.1,budget=shared|transform:64", "knorm@0.3|delta:10",
)  # fmt: skip


@pytest.fixture(params=["cpu", "cuda"], scope="module")
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return str(request.param)


@pytest.fixture(scope="module")
def here(device: str) -> VLM:
    return load("testbed/cloud", device=device, dtype="float32")


def moved(family: str, device: str) -> tuple[Any, dict[str, torch.Tensor]]:
    model, inputs = build(family)
    return model.to(device), {key: value.to(device) for key, value in inputs.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_evidence_equals_eager_attention(family: str, device: str) -> None:
    model, inputs = moved(family, device)
    prefilled = prefill_inputs(model, inputs, REQUESTS)
    before = text_config(model)._attn_implementation
    use(model, "eager")
    with torch.no_grad():
        seen = model(**inputs, output_attentions=True)
    use(model, before)
    heads = len(prefilled.cache.layers[0].keys)
    for request in REQUESTS:
        rows = torch.from_numpy(rows_of(request, prefilled.cache.layout)).to(device)
        for layer, columns in prefilled.evidence.column_sums[request].items():
            expected = seen.attentions[layer][0].unflatten(0, (heads, -1)).mean(1)[:, rows].sum(1)[:, :-1]
            torch.testing.assert_close(columns.to(device), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_cache_continues_like_stock_generate(family: str, device: str) -> None:
    model, inputs = moved(family, device)
    stock = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    said = continue_from(model, prefill_inputs(model, inputs).cache, max_new_tokens=6, stop=())
    ends = model.generation_config.eos_token_id
    assert [*said.token_ids][: len(stock)] == stock.tolist() or ends in stock.tolist()


@pytest.mark.parametrize("recipe", RECIPES)
def test_caches_cross_to_and_from_any_device(recipe: str, here: VLM, device: str) -> None:
    (sample,) = samples("validation", 1)
    prefilled = here.prefill(sample.images, sample.question, recipe=recipe)
    blob = compress(prefilled, recipe)
    there, back = decompress(blob, device), decompress(blob)
    for one, two in zip(there, back, strict=True):
        assert one.keys.device.type == device
        assert torch.equal(one.keys.cpu(), two.keys)
        assert torch.equal(one.values.cpu(), two.values)
    assert here.answer(there) == here.answer(back)
