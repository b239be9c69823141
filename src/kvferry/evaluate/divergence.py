"""How far the distributions of the next token, and the outputs of the attention, move."""

from __future__ import annotations

from collections.abc import Sequence

from kvferry.lazy import torch


def divergence(full: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL of the next-token distributions, ``KL(full || other)`` in nats.

    Parameters
    ----------
    full, other : ``[tokens, vocabulary]``
        Logits.
    """
    p, q = (x.double().log_softmax(-1) for x in (full, other))
    terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
    return float(terms.sum(-1).mean().clamp(min=0))


def output_error(full: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> float:
    """Relative error of the attention's outputs, ``|other - full| / |full|`` (Frobenius), mean over layers.

    Every layer's queries are those of its own run, so that what went wrong in the layers below is in it.

    Parameters
    ----------
    full, other : of each layer ``[tokens, query_heads, d]``
    """
    ratios = [
        float((b.double() - a.double()).norm() / a.double().norm().clamp(min=1e-30))
        for a, b in zip(full, other, strict=True)
    ]
    return sum(ratios) / len(ratios)
