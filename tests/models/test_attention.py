"""Column sums in blocks against softmax written out, and which rows a request means."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvferry.cache import PromptLayout, Role
from kvferry.errors import EvidenceError, InputError
from kvferry.evidence import EvidenceRequest
from kvferry.models import prefill_inputs
from kvferry.models.attention import NAME, Observer, attach, attached, detach, rows_of
from kvferry.models.blockwise import Rule, attend, column_sums, densities, density
from kvferry.models.queries import coming_queries
from kvferry.rope import Rotary
from tests.models.families import build


def layout(n: int, visual: slice, question: slice) -> PromptLayout:
    modality, role = np.zeros(n, np.uint8), np.full(n, Role.SPECIAL, np.uint8)
    modality[visual], role[visual], role[question] = 1, Role.CONTEXT, Role.QUESTION
    return PromptLayout(np.zeros(n, np.int32), modality, role, np.arange(n, dtype=np.int32)[None])


KINDS = ["causal", "full", "bool", "float", "half", "per head", "soft cap", "sinks", "dropped", "everything"]


def case(kind: str, n: int) -> tuple[torch.Tensor, torch.Tensor, Rule, torch.Tensor]:
    """Queries ``[6, n, 8]``, keys ``[2, n, 8]``, a rule, and its attention written out, ``[6, n, n]``."""
    torch.manual_seed(n)
    query, key, sinks = torch.randn(6, n, 8), torch.randn(2, n, 8), torch.randn(6)
    past, itself = torch.ones(n, n).tril().bool(), torch.eye(n).bool()
    hidden = past & (torch.rand(n, n) > 0.3) | itself
    dropped = torch.rand(2, n) > 0.5
    lowest = torch.finfo(torch.float16).min if kind == "half" else torch.finfo(torch.float32).min
    mask = {
        "bool": hidden[None],
        "float": torch.where(hidden, 0.0, lowest)[None],
        "half": torch.where(hidden, 0.0, lowest)[None].half(),
        "per head": hidden.expand(6, -1, -1),
        "everything": hidden[None],
    }.get(kind)
    rule = Rule(
        scaling=0.4,
        mask=mask,
        causal=kind in ("causal", "soft cap", "sinks", "dropped"),
        softcap=1.5 if kind in ("soft cap", "everything") else None,
        sinks=sinks if kind in ("sinks", "everything") else None,
        dropped=dropped if kind in ("dropped", "everything") else None,
    )
    logits = 0.4 * query @ key.repeat_interleave(3, 0).transpose(1, 2)
    if rule.softcap is not None:
        logits = 1.5 * torch.tanh(logits / 1.5)
    allowed = hidden if mask is not None else past if rule.causal else torch.ones(n, n).bool()
    if rule.dropped is not None:
        allowed = allowed & (~dropped.repeat_interleave(3, 0)[:, None] | itself)
    logits = logits.masked_fill(~allowed, -torch.inf)
    if rule.sinks is not None:
        logits = torch.cat([logits, sinks[:, None, None].expand(-1, n, 1)], dim=-1)
    return query, key, rule, logits.softmax(-1)[..., :n]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 7, 64, 150])
def test_blocks_equal_attention_written_out(kind: str, n: int) -> None:
    query, key, rule, attention = case(kind, n)
    rows = torch.arange(n)[torch.rand(n) > 0.2] if n > 1 else torch.arange(n)
    weights = torch.rand(3, len(rows)).round()
    weights[:, 0] = 1
    got = column_sums(query, key, rows, weights, rule)
    mean = attention.unflatten(0, (2, 3)).mean(1)
    torch.testing.assert_close(got, torch.einsum("qr,hrn->qhn", weights, mean[:, rows]), atol=1e-5, rtol=1e-5)

    value = torch.randn(2, n, 5)
    expected = attention @ value.repeat_interleave(3, 0)
    torch.testing.assert_close(attend(query, key, value, rule), expected, atol=1e-5, rtol=1e-5)

    thresholds = [0.01, 0.3, 1.0]
    got = density(densities(query, key, rows, weights, thresholds, rule))
    for index, threshold in enumerate(thresholds):
        seen = attention[:, rows[weights[index] > 0]]
        large = (seen >= threshold * seen.amax(-1, keepdim=True)) & (seen > 0)
        share = large.sum((1, 2)) / (seen > 0).sum((1, 2))
        torch.testing.assert_close(got[index], share.view(2, 3).mean(1))


def test_blocks_shrink_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, rule, attention = case("everything", 70)
    monkeypatch.setattr("kvferry.models.blockwise.LOGITS_PER_BLOCK", 1)
    rows = torch.arange(70)
    got = column_sums(query, key, rows, torch.ones(1, 70), rule)[0]
    torch.testing.assert_close(got, attention.unflatten(0, (2, 3)).mean(1).sum(1), atol=1e-5, rtol=1e-5)


def test_coming_queries_are_the_mean_rotation_of_a_gaussian() -> None:
    torch.manual_seed(0)
    prompt = layout(30, slice(2, 6), slice(7, 10))
    rotary = Rotary(torch.tensor([1.0, 0.3]), scaling=1.2)
    straight = torch.randn(3, 30, 6) + torch.arange(6)
    rows = torch.arange(2, 30)
    turned = rotary.rotate(straight, torch.arange(30)[None])
    got = coming_queries(turned[:, 2:], rows, prompt, rotary, horizon=7, scaling=0.5)

    matrices = [rotary.rotate(torch.eye(6)[None], torch.full((1, 6), 30 + step))[0].T for step in range(7)]
    mean_turn = torch.stack(matrices).mean(0)
    for head in range(3):
        some = 0.5 * straight[head, 4:]
        torch.testing.assert_close(got[head, 0], mean_turn @ some.mean(0), atol=1e-5, rtol=1e-5)
        covariance = torch.cov(some.T, correction=0)
        torch.testing.assert_close(got[head, 1:], mean_turn @ covariance @ mean_turn.T, atol=1e-5, rtol=1e-5)
    few = coming_queries(turned[:, 1:2], torch.tensor([1]), prompt, rotary, horizon=7, scaling=0.5)
    assert few[:, 1:].abs().max() == 0


def test_coming_queries_need_a_fixed_rotation() -> None:
    prompt, rotary = layout(9, slice(2, 6), slice(7, 9)), Rotary(torch.tensor([1.0]))
    everywhere = EvidenceRequest("all", statistic="queries")
    with pytest.raises(EvidenceError, match="layer 1 does not turn"):
        Observer([everywhere], prompt, 2, [rotary, None])
    with pytest.raises(EvidenceError, match="layer 0 does not turn"):
        Observer([everywhere], prompt, 2)
    Observer([EvidenceRequest("all", layers="last", statistic="queries")], prompt, 2, [None, rotary])


def test_rows() -> None:
    prompt = layout(12, slice(2, 6), slice(7, 10))

    def rows(name: str, window: int = 0) -> list[int]:
        request = EvidenceRequest(name, window=window)  # type: ignore[arg-type]
        return [int(x) for x in np.flatnonzero(rows_of(request, prompt))]

    assert rows("question") == [7, 8, 9]
    assert rows("window", 3) == [9, 10, 11]
    assert rows("window", 99) == list(range(12))
    assert rows("post_vision") == list(range(6, 12))
    assert rows("visual") == [2, 3, 4, 5]
    assert rows("all") == list(range(12))
    assert rows_of(EvidenceRequest("post_vision"), layout(5, slice(0, 0), slice(0, 0))).all()
    with pytest.raises(EvidenceError, match="'window' rows"):
        rows("window", 0)
    with pytest.raises(EvidenceError, match="'visual' rows to observe; show a picture"):
        rows_of(EvidenceRequest("visual"), layout(5, slice(0, 0), slice(0, 0)))
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


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_padded_batches_outside_a_session_are_eager(name: str) -> None:
    """A model that is attached for good still serves others: two prompts, one of them padded on the left."""
    model, inputs = build(name)
    ids = inputs["input_ids"].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with attached(model):
            got = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(got[0], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got[1, 7:], expected[1, 7:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bad", [{"threshold": 0.0}, {"threshold": 1.5}, {"threshold": float("nan")}, {"horizon": 0}])
def test_requests_that_mean_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(InputError, match="must"):
        EvidenceRequest("all", **bad)  # type: ignore[arg-type]


def test_overflow_is_named() -> None:
    model, inputs = build("llama")
    model.half()
    requests = [EvidenceRequest("window", window=3, statistic=x) for x in ("sum", "density", "queries")]  # type: ignore[arg-type]
    sound = prefill_inputs(model, inputs, requests).evidence
    assert all(sound.of(x, 1).isfinite().all() for x in requests)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(4e4)
    broken = prefill_inputs(model, inputs, requests).evidence
    for request in requests:
        with pytest.raises(EvidenceError, match=r"layer 1 holds NaN or infinity.*bfloat16"):
            broken.of(request, 1)
