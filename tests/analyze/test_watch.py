"""Attention by groups, in blocks of rows, against softmax written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvferry.analyze.watch import THRESHOLD, AttentionWatch, look
from kvferry.models.blockwise import Rule
from tests.helpers import layout


@pytest.mark.parametrize("kind", ["causal", "full", "bool", "float", "per head"])
@pytest.mark.parametrize("n", [2, 64, 150])
def test_against_the_whole_matrix(kind: str, n: int) -> None:
    torch.manual_seed(n)
    query, key = 3 * torch.randn(6, n, 8), torch.randn(2, n, 8)
    past = torch.ones(n, n).tril().bool()
    hidden = past & (torch.rand(n, n) > 0.3) | torch.eye(n).bool()
    mask = {
        "bool": hidden[None],
        "float": torch.where(hidden, 0.0, torch.finfo(torch.float32).min)[None],
        "per head": hidden.expand(6, -1, -1),
    }.get(kind)
    groups = (torch.rand(3, n) > 0.4).float()
    groups[:, 0] = 1
    split = torch.nn.functional.one_hot((torch.rand(n) > 0.5).long(), 2).float()
    seen = look(query, key, groups, split, Rule(0.7, mask, causal=kind == "causal"))

    allowed = past if kind == "causal" else torch.ones(n, n).bool() if kind == "full" else hidden
    logits = 0.7 * query @ key.repeat_interleave(3, 0).transpose(1, 2)
    a = logits.masked_fill(~allowed, -torch.inf).softmax(-1).double().numpy()
    allow, by, cut = allowed.numpy(), groups.numpy(), split.numpy()
    strong = allow & (a >= THRESHOLD * a.max(-1, keepdims=True))
    entropy = -(a * np.log(np.where(a > 0, a, 1))).sum(-1) / np.log(np.maximum(allow.sum(-1), 2))
    np.testing.assert_allclose(seen.columns, by @ a.mean(0), atol=1e-4)
    np.testing.assert_allclose(seen.visible, by @ allow @ cut, rtol=1e-5)
    np.testing.assert_allclose(seen.survived, by @ strong.mean(0) @ cut, rtol=1e-5)
    np.testing.assert_allclose(seen.entropy, (by * entropy.mean(0)).sum(1) / by.sum(1), rtol=1e-4)
    np.testing.assert_array_equal(seen.rows, by.sum(1))


def test_each_prompt_is_seen_afresh_and_text_has_no_visual_rows() -> None:
    watch = AttentionWatch()
    for prompt in (layout(), layout(rows=0, columns=0)):
        n = len(prompt)
        watch.start(prompt)
        watch.observe(0, torch.randn(4, n, 8), torch.randn(2, n, 8), Rule(0.3))
        (layer,) = watch.layers
        assert layer.columns.shape == (3, n)
    assert layer.rows[2] == 0
    assert layer.visible[:, 0].tolist() == [0, 0, 0]
    assert np.isnan(layer.entropy[2])
