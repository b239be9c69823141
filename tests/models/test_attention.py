"""Column sums in blocks against softmax written out, and which rows a request means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvferry.cache import PromptLayout, Role
from kvferry.errors import EvidenceError
from kvferry.evidence import EvidenceRequest
from kvferry.models.attention import NAME, attach, column_sums, detach, rows_of
from tests.models.families import build


def layout(n: int, visual: slice, question: slice) -> PromptLayout:
    modality, role = np.zeros(n, np.uint8), np.full(n, Role.SPECIAL, np.uint8)
    modality[visual], role[visual], role[question] = 1, Role.CONTEXT, Role.QUESTION
    return PromptLayout(np.zeros(n, np.int32), modality, role, np.arange(n, dtype=np.int32)[None])


@pytest.mark.parametrize("kind", ["causal", "full", "bool", "float", "per head"])
@pytest.mark.parametrize("n", [1, 7, 64, 150])
def test_column_sums(kind: str, n: int) -> None:
    torch.manual_seed(n)
    query, key = torch.randn(6, n, 8), torch.randn(2, n, 8)
    past = torch.ones(n, n).tril().bool()
    hidden = past & (torch.rand(n, n) > 0.3) | torch.eye(n).bool()
    mask = {
        "bool": hidden[None],
        "float": torch.where(hidden, 0.0, torch.finfo(torch.float32).min)[None],
        "per head": hidden.expand(6, -1, -1),
    }.get(kind)
    rows = torch.arange(n)[torch.rand(n) > 0.2] if n > 1 else torch.arange(n)
    weights = torch.rand(3, len(rows)).round()
    got = column_sums(query, key, rows, weights, scaling=0.4, mask=mask, causal=kind == "causal")

    logits = 0.4 * query @ key.repeat_interleave(3, 0).transpose(1, 2)
    allowed = past if kind == "causal" else torch.ones(n, n).bool() if kind == "full" else hidden
    attention = logits.masked_fill(~allowed, -torch.inf).softmax(-1).unflatten(0, (2, 3)).mean(1)
    torch.testing.assert_close(got, torch.einsum("qr,hrn->qhn", weights, attention[:, rows]), atol=1e-5, rtol=1e-5)


def test_rows() -> None:
    prompt = layout(12, slice(2, 6), slice(7, 10))

    def rows(name: str, window: int = 0) -> list[int]:
        request = EvidenceRequest(name, window=window)  # type: ignore[arg-type]
        return [int(x) for x in np.flatnonzero(rows_of(request, prompt))]

    assert rows("question") == [7, 8, 9]
    assert rows("window", 3) == [9, 10, 11]
    assert rows("window", 99) == list(range(12))
    assert rows("post_vision") == list(range(6, 12))
    assert rows("all") == list(range(12))
    assert rows_of(EvidenceRequest("post_vision"), layout(5, slice(0, 0), slice(0, 0))).all()
    with pytest.raises(EvidenceError, match="'window' rows"):
        rows("window", 0)
    with pytest.raises(EvidenceError, match="ask a question"):
        rows_of(EvidenceRequest("question"), layout(5, slice(0, 2), slice(0, 0)))


def test_attach_counts_its_users() -> None:
    model = build("llava")[0]
    text, tower = model.config.text_config, model.config.vision_config
    before = (text._attn_implementation, tower._attn_implementation)
    attach(model)
    attach(model)
    assert (text._attn_implementation, tower._attn_implementation) == (NAME, before[1])
    detach(model)
    assert text._attn_implementation == NAME
    detach(model)
    assert (text._attn_implementation, tower._attn_implementation) == before
