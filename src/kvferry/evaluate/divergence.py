"""How far the distributions of the next token move."""

from __future__ import annotations

import torch


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
