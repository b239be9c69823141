"""What each scorer asks for, what it scores, and how many recent tokens it holds back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvferry.cache import KVCache, LayerCache
from kvferry.errors import EvidenceError, InputError
from kvferry.evidence import Evidence, EvidenceRequest
from kvferry.recipe import Recipe
from kvferry.selection import SCORERS, SINKS
from tests.helpers import cache as random_cache

NEW = ("h2o", "streaming", "vlcache", "keydiff", "value_norm", "expected_attention")


def with_layer(cache: KVCache, keys: torch.Tensor, values: torch.Tensor) -> KVCache:
    """``cache`` with one layer of these keys and values."""
    return replace(cache, layers=(LayerCache(keys, values, cache.layers[0].positions),))


def gaussian(cache: KVCache, heads: int) -> torch.Tensor:
    """A random mean and a covariance that is one, ``[heads, 1 + d, d]``."""
    d = cache.layers[0].keys.shape[2]
    half = torch.randn(heads, d, d, generator=torch.Generator().manual_seed(1))
    return torch.cat([half[:, :1], 0.1 * half @ half.transpose(1, 2)], dim=1)


@pytest.mark.parametrize("name", NEW)
def test_by_name(name: str) -> None:
    assert str(Recipe.parse(f"{name}@0.25|int8")) == f"{name}@0.25|int8"


@pytest.mark.parametrize(
    ("name", "requests"),
    [
        ("h2o", (EvidenceRequest("all"),)),
        ("vlcache", (EvidenceRequest("post_vision"),)),
        ("expected_attention", (EvidenceRequest("all", statistic="queries", horizon=512),)),
        ("streaming", ()),
        ("keydiff", ()),
        ("value_norm", ()),
    ],
)
def test_requests(name: str, requests: tuple[EvidenceRequest, ...]) -> None:
    assert SCORERS[name]().requests == requests
    if requests:
        with pytest.raises(EvidenceError, match="prefill"):
            SCORERS[name]().score(random_cache(), Evidence())


@pytest.mark.parametrize("name", ["h2o", "vlcache"])
def test_column_sums_are_the_score(name: str) -> None:
    cache, scorer = random_cache(), SCORERS[name]()
    sums = {layer: torch.rand(2, cache.length) for layer in range(3)}
    scores = scorer.score(cache, Evidence({scorer.requests[0]: sums}))
    assert all(torch.equal(scores[layer], sums[layer]) for layer in range(3))


@given(st.integers(0, 1000))
def test_recent_tokens(keep: int) -> None:
    assert SCORERS["h2o"]().recent(keep) == keep // 2
    assert abs(SCORERS["vlcache"]().recent(keep) - keep / 10) <= 0.5
    assert not any(hasattr(SCORERS[name], "recent") for name in NEW if name not in ("h2o", "vlcache"))


def test_streaming_keeps_the_sinks_and_the_end() -> None:
    cache = random_cache()
    kept = Recipe.parse("streaming@0.3").select(cache).positions[0][0].tolist()
    assert kept == [*range(SINKS), *range(cache.length - (len(kept) - SINKS), cache.length)]


def test_keydiff_prefers_the_odd_one_out() -> None:
    cache = random_cache(layers=1)
    keys = torch.ones(2, cache.length, 8) + 0.01 * torch.randn(2, cache.length, 8)
    keys[0, 5], keys[1, 9] = -30 * keys[0, 5], torch.tensor([1.0, -1.0] * 4)
    (scores,) = SCORERS["keydiff"]().score(with_layer(cache, keys, keys), Evidence())
    assert scores.argmax(1).tolist() == [5, 9]
    assert scores[0, 5] == pytest.approx(1, abs=1e-3)
    assert scores[1, 9] == pytest.approx(0, abs=0.1)
    longer = with_layer(cache, keys * torch.rand(2, cache.length, 1), keys)
    torch.testing.assert_close(SCORERS["keydiff"]().score(longer, Evidence())[0], scores)


def test_value_norm_prefers_large_values() -> None:
    cache = random_cache(layers=1)
    values = torch.ones(2, cache.length, 8)
    values[0, 5] *= 3
    values[1, 9] *= -2
    (scores,) = SCORERS["value_norm"]().score(with_layer(cache, values, values), Evidence())
    assert scores.argmax(1).tolist() == [5, 9]
    assert scores[0, 5] == pytest.approx(3 * math.sqrt(8))


@pytest.mark.parametrize("epsilon", [0.0, 0.02])
def test_expected_attention_written_out(epsilon: float) -> None:
    cache = random_cache(layers=1, dtype=torch.float32)
    scorer, model = SCORERS["expected_attention"](epsilon=epsilon), gaussian(cache, heads=6)
    (scores,) = scorer.score(cache, Evidence({scorer.requests[0]: {0: model}}))
    (layer,) = cache.layers
    for head in range(2):
        weights = torch.zeros(cache.length)
        for query in range(3 * head, 3 * head + 3):
            mean, covariance = model[query, 0], model[query, 1:]
            weight = torch.stack([(mean @ k + k @ covariance @ k / 2).exp() for k in layer.keys[head]])
            weights += weight / weight[SINKS:].sum() / 3
        expected = (weights + epsilon) * layer.values[head].norm(dim=-1)
        torch.testing.assert_close(scores[head, SINKS:], expected[SINKS:], atol=1e-4, rtol=1e-4)
        assert (scores[head, :SINKS] == scores[head].max()).all()


def test_expected_attention_is_the_mean_over_drawn_queries() -> None:
    """The closed form against a hundred thousand queries drawn from the Gaussian."""
    torch.manual_seed(0)
    cache = random_cache(layers=1, heads=1, dtype=torch.float32)
    scorer, model = SCORERS["expected_attention"](epsilon=0.0), 0.3 * gaussian(cache, heads=1)
    normal = torch.distributions.MultivariateNormal(model[0, 0], model[0, 1:])
    keys, values = cache.layers[0].keys[0], cache.layers[0].values[0]
    drawn = (normal.sample((100_000,)) @ keys.T).exp().mean(0)[SINKS:]
    (scores,) = scorer.score(cache, Evidence({scorer.requests[0]: {0: model}}))
    expected = drawn / drawn.sum() * values[SINKS:].norm(dim=-1)
    torch.testing.assert_close(scores[0, SINKS:], expected, rtol=0.1, atol=0.01)


def test_expected_attention_of_a_prompt_of_sinks() -> None:
    cache = random_cache(layers=1)
    short = replace(cache, layers=(cache.layers[0].take(torch.arange(3).expand(2, -1)),), length=3)
    scorer = SCORERS["expected_attention"]()
    (scores,) = scorer.score(short, Evidence({scorer.requests[0]: {0: gaussian(cache, heads=2)}}))
    assert scores.shape == (2, 3)
    assert scores.isfinite().all()


@pytest.mark.parametrize("options", [{"horizon": 0}, {"epsilon": -1.0}, {"epsilon": float("nan")}])
def test_expected_attention_refuses_odd_settings(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="expected_attention needs"):
        SCORERS["expected_attention"](**options)


def test_overflow_is_named() -> None:
    cache, scorer = random_cache(), SCORERS["h2o"]()
    broken = torch.rand(2, cache.length)
    broken[1, 3] = torch.nan
    with pytest.raises(EvidenceError, match="layer 0 holds NaN"):
        scorer.score(cache, Evidence({scorer.requests[0]: dict.fromkeys(range(3), broken)}))


def test_leaving_a_token_out_moves_the_output_by_its_score() -> None:
    cache = random_cache()
    torch.manual_seed(0)
    logits = torch.randn(2, cache.length) * 3
    request = EvidenceRequest("window", window=1)
    evidence = Evidence({request: dict.fromkeys(range(len(cache.layers)), logits.softmax(-1))})
    scores = SCORERS["leaveout"](window=1).score(cache, evidence)
    for layer, score in zip(cache, scores, strict=True):
        whole = logits.softmax(-1).unsqueeze(1) @ layer.values.float()
        for token in (0, 5, cache.length - 1):
            without = logits.clone()
            without[:, token] = -torch.inf
            moved = without.softmax(-1).unsqueeze(1) @ layer.values.float() - whole
            torch.testing.assert_close(score[:, token], moved.norm(dim=-1)[:, 0], rtol=1e-3, atol=1e-5)


def test_leaveout_survives_attention_on_a_single_token() -> None:
    cache = random_cache()
    request = EvidenceRequest("window", window=4)
    alone = torch.zeros(2, cache.length)
    alone[:, 3] = 4.0
    evidence = Evidence({request: dict.fromkeys(range(len(cache.layers)), alone)})
    assert all(score.isfinite().all() for score in SCORERS["leaveout"]().score(cache, evidence))
    with pytest.raises(InputError, match="window"):
        SCORERS["leaveout"](window=0)
